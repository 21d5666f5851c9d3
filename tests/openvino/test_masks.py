"""What a model says of its masks is read again, and anything else is no reason to fail."""

from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch

from actsparse.mask import Mask
from actsparse.openvino.graph_masks import find_masks
from actsparse.openvino.masks import masks_of, replace_masks

UP, GATE, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down"))


def make_mask(threshold: float, tokens: str = "all") -> Mask:
    return Mask(torch.tensor(threshold), 0.5, 0.4, tokens, "magnitude", "site", ("a", "b"))


def test_masks_are_what_was_placed(openvino_llama: ov.Model) -> None:
    masks = {GATE: make_mask(1.0), UP: make_mask(1.0), DOWN: make_mask(0.5, "decode")}
    replace_masks(openvino_llama, masks)
    assert masks_of(openvino_llama) == masks
    assert sorted(len(mask.linears) for mask in find_masks(openvino_llama)) == [1, 2]


def test_layers_of_one_site_with_different_thresholds_have_different_masks(openvino_llama: ov.Model) -> None:
    masks = {GATE: make_mask(1.0), UP: make_mask(0.5)}
    replace_masks(openvino_llama, masks)
    assert masks_of(openvino_llama) == masks
    assert len(find_masks(openvino_llama)) == 2


def test_earlier_masks_and_what_was_known_of_them_are_gone(openvino_llama: ov.Model) -> None:
    replace_masks(openvino_llama, {GATE: make_mask(1.0), UP: make_mask(1.0)})
    replace_masks(openvino_llama, {DOWN: make_mask(2.0), UP: make_mask(-np.inf)})
    assert masks_of(openvino_llama) == {DOWN: make_mask(2.0)}


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1}', '{"a": {"roles": 3}}', "[" * 100_000])
def test_a_model_that_says_nonsense_of_its_masks_says_nothing(text: str, openvino_llama: ov.Model) -> None:
    replace_masks(openvino_llama, {DOWN: make_mask(2.0)})
    openvino_llama.set_rt_info(text, ["actsparse", "masks"])
    assert masks_of(openvino_llama) == {DOWN: Mask(torch.tensor(2.0))}


def test_thresholds_rounded_to_fp16_on_saving_are_still_masks(openvino_llama: ov.Model, tmp_path: Any) -> None:
    replace_masks(openvino_llama, {DOWN: make_mask(0.3)})
    ov.save_model(openvino_llama, tmp_path / "model.xml", compress_to_fp16=True)
    (mask,) = masks_of(ov.Core().read_model(tmp_path / "model.xml")).values()
    assert mask.threshold.item() == pytest.approx(0.3, rel=2**-11)
