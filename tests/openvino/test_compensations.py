"""Compensations in OpenVINO models: placed, read, moved, removed, counted, and run by the extension."""

import copy
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch

from actsparse import load_thresholds, measure_sparsity, save_thresholds, sparsify_activations
from actsparse.mask import Compensation
from actsparse.openvino import accelerate, count_masks, export_model
from actsparse.openvino.acceleration import is_accelerated
from actsparse.openvino.compensations import BIASED
from actsparse.openvino.graph_masks import remove_masks
from actsparse.openvino.linear import find_linears
from actsparse.openvino.masks import masks_of
from actsparse.openvino.runner import EXACT, Runner
from actsparse.torch.insertion import named_sparsifiers

pytestmark = pytest.mark.slow


def fill_in(model: Any) -> Any:
    """Give masks of attention's inputs a shift, of its output a basis, and all a bias, whatever the weights are."""
    generator = torch.Generator().manual_seed(3)
    by_site: dict[str, Compensation] = {}
    for name, mask in named_sparsifiers(model):
        channels = model.get_submodule(name).in_features
        # As f16 holds it, in which the exported model keeps it.
        basis = torch.linalg.qr(torch.randn(channels, 3, generator=generator))[0].half().float()
        bias = torch.randn(channels, generator=generator) / 8
        shift = torch.tensor(0.125) if "self_attn" in name and "o_proj" not in name else None
        made = Compensation(shift, basis if "o_proj" in name else None, bias)
        mask.set_compensation(by_site.setdefault(mask.site, made))
    return model


@pytest.fixture
def masked(make_model: Any, batches: list[Any]) -> Any:
    return fill_in(sparsify_activations(make_model(), batches, 0.5))


def logits(model: ov.Model, batch: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(Runner(model).run(batch)["logits"]))


def read(folder: Path) -> ov.Model:
    return ov.Core().read_model(folder / "openvino_model.xml")


@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_an_exported_model_predicts_what_torch_does(
    tokens: str, masked: Any, batches: list[Any], tmp_path: Path
) -> None:
    for _, mask in named_sparsifiers(masked):
        mask.tokens = tokens
    before = [mask.compensation for _, mask in named_sparsifiers(masked)]
    model = read(export_model(masked, tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batches[0]), masked(**batches[0]).logits, atol=2e-3, rtol=0)
        one = {name: value[:, :1] for name, value in batches[0].items()}
        torch.testing.assert_close(logits(model, one), masked(**one).logits, atol=2e-3, rtol=0)
    assert [mask.compensation for _, mask in named_sparsifiers(masked)] == before


def test_a_file_fits_both_ways_and_removing_leaves_nothing(
    masked: Any, batches: list[Any], make_openvino_model: Any, make_model: Any, picture: Any, tmp_path: Path
) -> None:
    save_thresholds(masked, tmp_path / "file")
    model = make_openvino_model("llama")
    bare, dense = picture(model)[0], logits(model, batches[0])
    layers = [linear.name for linear in find_linears(model)]
    for _ in range(2):  # replacing puts nothing twice
        load_thresholds(model, tmp_path / "file")
    assert [linear.name for linear in find_linears(model)] == layers
    assert count_masks(model) == 8
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batches[0]), masked(**batches[0]).logits, atol=2e-3, rtol=0)
    found = masks_of(model)
    for name, mask in named_sparsifiers(masked):
        assert found[name].compensation == mask.compensation
    save_thresholds(model, tmp_path / "again")
    back = load_thresholds(make_model(), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(back(**batches[0]).logits, masked(**batches[0]).logits)
    remove_masks(model)
    assert picture(model)[0] == bare
    assert torch.equal(logits(model, batches[0]), dense)


def test_zeros_are_counted_and_the_low_rank_part_paid_for(masked: Any, batches: list[Any], tmp_path: Path) -> None:
    expected = {layer.name: layer.sparsity for layer in measure_sparsity(masked, batches).layers}
    found = measure_sparsity(read(export_model(masked, tmp_path)), batches)
    for layer in found.layers:
        assert layer.sparsity == pytest.approx(expected[layer.name], abs=0.01), layer.name


@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_the_extension_runs_the_sites(tokens: str, make_model: Any, make_batches: Any, tmp_path: Path) -> None:
    batches = make_batches(2, batch_size=1, length=24)
    torch_model = fill_in(sparsify_activations(make_model(), batches, 0.5, tokens=tokens))
    torch_model = nncf.compress_weights(
        torch_model, mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=nncf.Dataset(batches[:1])
    )
    model = read(export_model(copy.deepcopy(torch_model), tmp_path))
    one = {name: value[:, :1] for name, value in batches[0].items()}
    portable = [Runner(model, EXACT).run(batch)["logits"].copy() for batch in (batches[0], one)]
    accelerated = accelerate(model, exact=True)
    assert is_accelerated(model)
    assert not accelerated.kept
    # Biases are the kernel's own: a network is one operation with them, too.
    assert {site.operation for site in accelerated.masked} == {"SparseLinear", "SparseFeedForward"}
    assert not [node for node in model.get_ops() if node.get_friendly_name().endswith(BIASED)]
    for batch, expected in zip((batches[0], one), portable, strict=True):
        np.testing.assert_allclose(Runner(model, EXACT).run(batch)["logits"], expected, atol=1e-3)
