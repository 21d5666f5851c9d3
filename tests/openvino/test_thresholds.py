"""A thresholds file fits a torch model and what it was converted to, in both directions."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from optimum.intel import OVModelForCausalLM

from actsparse import TargetScope, load_thresholds, save_thresholds, sparsify_activations
from actsparse.errors import ThresholdsError
from actsparse.openvino import export_model, find_masks
from actsparse.openvino.graph_masks import insert_mask
from actsparse.openvino.layers import named_calls
from actsparse.openvino.masks import masks_of
from actsparse.openvino.runner import Runner
from actsparse.thresholds import fingerprint
from actsparse.torch.insertion import named_sparsifiers

TARGETS = {TargetScope(roles=("ffn.up", "ffn.gate")): 0.4, TargetScope(roles=("ffn.down",)): 0.6}


def describe_torch(model: Any) -> list[Any]:
    masks = named_sparsifiers(model)
    return sorted((n, s.threshold.item(), s.target_sparsity, s.tokens, s.algorithm, s.roles) for n, s in masks)


def describe_openvino(model: ov.Model) -> list[Any]:
    return sorted(
        (n, m.threshold.item(), m.target_sparsity, m.tokens, m.algorithm, m.roles) for n, m in masks_of(model).items()
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "mistral", "gpt2", "gpt_neox", "opt"])
def test_converted_models_have_the_fingerprint_of_the_torch_model(
    architecture: str, make_model: Any, make_openvino_model: Any
) -> None:
    assert fingerprint(make_openvino_model(architecture)) == fingerprint(make_model(architecture))


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT4_SYM"])
def test_compression_does_not_change_the_fingerprint(mode: str, make_openvino_model: Any) -> None:
    assert fingerprint(make_openvino_model("llama", mode)) == fingerprint(make_openvino_model("llama"))


@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_a_torch_models_file_fits_the_openvino_model(
    tokens: str, make_model: Any, make_openvino_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    torch_model = sparsify_activations(make_model(), batches, TARGETS, tokens=tokens)
    save_thresholds(torch_model, tmp_path / "thresholds")
    model = sparsify_activations(make_openvino_model(), batches[:1], 0.9)
    assert load_thresholds(model, tmp_path / "thresholds") is model
    assert describe_openvino(model) == describe_torch(torch_model)
    with torch.no_grad():
        expected = torch_model(**batches[0]).logits
    np.testing.assert_allclose(Runner(model).run(batches[0])["logits"], expected, atol=1e-3)


def test_an_openvino_models_file_fits_the_torch_model(
    make_model: Any, make_openvino_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    model = sparsify_activations(make_openvino_model("llama", "INT8_ASYM"), batches, TARGETS)
    save_thresholds(model, tmp_path / "thresholds", calibration="random tokens")
    torch_model = load_thresholds(make_model(), tmp_path / "thresholds")
    assert describe_torch(torch_model) == describe_openvino(model)


def test_a_torch_mask_of_target_0_needs_no_mask(
    make_model: Any, make_openvino_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    save_thresholds(sparsify_activations(make_model(), batches, {**TARGETS, TargetScope(
        roles=("attention.out",)): 0.0}), tmp_path / "thresholds")  # fmt: skip
    model = load_thresholds(make_openvino_model(), tmp_path / "thresholds")
    assert {name.split(".")[3] for name in masks_of(model)} == {"mlp"}


def test_channels_that_no_weight_reads_survive_the_export_and_both_files(
    make_model: Any, make_openvino_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    torch_model = make_model()
    with torch.no_grad():
        for layer in torch_model.model.layers:
            layer.mlp.down_proj.weight[:, -4:] = 0
    sparsify_activations(torch_model, batches, {TargetScope(roles=("ffn.down",)): 0.5}, algorithm="wina")
    folder = export_model(torch_model, tmp_path / "model")
    save_thresholds(torch_model, tmp_path / "torch")
    exported = ov.Core().read_model(folder / "openvino_model.xml")
    save_thresholds(exported, tmp_path / "openvino")
    expected = {name: s.threshold for name, s in named_sparsifiers(torch_model)}
    assert all(threshold[-4:].isfinite().all() for threshold in expected.values())
    for path in (tmp_path / "torch", tmp_path / "openvino"):
        found = masks_of(load_thresholds(make_openvino_model(), path))
        assert found.keys() == expected.keys()
        for name, mask in found.items():
            np.testing.assert_array_equal(mask.threshold, expected[name])
    with torch.no_grad():
        logits = torch_model(**batches[0]).logits
    np.testing.assert_allclose(Runner(exported).run(batches[0])["logits"], logits, atol=1e-3)


def test_another_models_file_is_refused(
    make_model: Any, make_openvino_model: Any, batches: list[Any], tmp_path: Path, picture: Any
) -> None:
    save_thresholds(sparsify_activations(make_model("phi3"), batches, TARGETS), tmp_path / "thresholds")
    model = sparsify_activations(make_openvino_model(), batches, TARGETS)
    before = picture(model)
    with pytest.raises(ThresholdsError, match="another model"):
        load_thresholds(model, tmp_path / "thresholds")
    assert picture(model) == before


def test_a_model_without_masks_has_no_thresholds_to_save(openvino_llama: ov.Model, tmp_path: Path) -> None:
    with pytest.raises(ThresholdsError, match="no activation sparsifiers"):
        save_thresholds(openvino_llama, tmp_path / "thresholds")


def test_masks_of_which_nothing_is_known_are_not_saved(openvino_llama: ov.Model, tmp_path: Path) -> None:
    (layer,) = named_calls(openvino_llama)["model.layers.0.mlp.down_proj"]
    insert_mask([layer], 1.0)
    with pytest.raises(ThresholdsError, match="does not say how the mask of model.layers.0.mlp.down_proj was made"):
        save_thresholds(openvino_llama, tmp_path / "thresholds")


def test_optimums_models_use_the_masks_at_once(export_folder: Any, batches: list[Any], tmp_path: Path) -> None:
    model: Any = OVModelForCausalLM.from_pretrained(export_folder("llama"))
    dense = model(**batches[0]).logits
    assert sparsify_activations(model, batches, TARGETS) is model
    sparse = model(**batches[0]).logits
    assert not torch.allclose(dense, sparse, atol=1e-2)
    save_thresholds(model, tmp_path / "thresholds")
    model.save_pretrained(tmp_path / "model")
    reloaded: Any = OVModelForCausalLM.from_pretrained(tmp_path / "model")
    assert describe_openvino(reloaded.model) == describe_openvino(model.model)
    other: Any = load_thresholds(OVModelForCausalLM.from_pretrained(export_folder("llama")), tmp_path / "thresholds")
    assert len(find_masks(other.model)) == 4
    torch.testing.assert_close(other(**batches[0]).logits, sparse)
