"""Masks of exact zeros in OpenVINO models: those of torch, and the extension skips what they make useless."""

from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actsparse import load_thresholds, save_thresholds, sparsify_activations
from actsparse.openvino import accelerate, export_model, load_causal_lm
from actsparse.openvino.masks import masks_of
from actsparse.openvino.runner import EXACT, OpenVinoLanguageModel, Runner
from actsparse.torch.compression import compress_int8

from ..conftest import GROUPED

pytestmark = pytest.mark.slow

# What the kernel runs as one operation, and what stays beside it.
ACTIVATIONS = {"relu": ["GatedFeedForward"] * 2, "relu2": ["GatedFeedForward"] * 2, "opt": ["SparseLinear"] * 2}


def make(activation: str, make_model: Any) -> Any:
    if activation == "opt":
        return make_model("opt")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**GROUPED, hidden_act=activation)).eval()


def logits(model: ov.Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.as_tensor(OpenVinoLanguageModel(Runner(model, EXACT))(**batch).logits)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_they_are_those_of_torch_and_the_kernel_gives_the_dense_outputs(
    activation: str, make_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    model = compress_int8(make(activation, make_model), "asym", batches[0])
    dense = ov.Core().read_model(export_model(model, tmp_path / "dense") / "openvino_model.xml")
    expected = logits(dense, batches[0])
    sparsify_activations(model, algorithm="zeros")
    converted = ov.Core().read_model(export_model(model, tmp_path / "masked") / "openvino_model.xml")
    own = sparsify_activations(dense.clone(), algorithm="zeros")
    assert masks_of(own) == masks_of(converted)
    save_thresholds(model, tmp_path / "file")
    assert masks_of(load_thresholds(dense.clone(), tmp_path / "file")) == masks_of(own)
    assert torch.allclose(logits(own, batches[0]), expected, atol=1e-6)
    done = accelerate(own, exact=True)
    assert [site.operation for site in done.masked] == ACTIVATIONS[activation]
    assert not done.kept
    assert torch.allclose(logits(own, batches[0]), expected, atol=1e-4 * float(expected.abs().max()))


def test_an_optimum_model_takes_them_too(make_model: Any, batches: list[Any], tmp_path: Path) -> None:
    export_model(compress_int8(make("relu", make_model), "asym", batches[0]), tmp_path)
    owner = load_causal_lm(tmp_path)
    with torch.no_grad():
        expected = owner(**batches[0], attention_mask=torch.ones_like(batches[0]["input_ids"])).logits
        sparsify_activations(owner, algorithm="zeros")
        masked = owner(**batches[0], attention_mask=torch.ones_like(batches[0]["input_ids"])).logits
    assert len(masks_of(owner.model)) == 4
    assert torch.allclose(masked, expected, atol=1e-5)
