"""Measured sparsity, counted by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from actsparse import ActsparseError, TargetScope, measure_sparsity, sparsify_activations
from actsparse.errors import DatasetError
from actsparse.evaluation.sparsity import count_zeros
from actsparse.sparsity_report import SparsityReport
from actsparse.torch.insertion import insert_sparsifier, named_sparsifiers
from actsparse.torch.sparsifier import ActivationSparsifier


def make_three_layers() -> nn.Module:
    """The first layer is masked at 1.5, the second at 0, the third is not masked."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    for name, threshold, roles in (("0", 1.5, ("ffn.gate", "ffn.up")), ("1", 0.0, ())):
        sparsifier = ActivationSparsifier(0.5, roles=roles)  # pyright: ignore[reportArgumentType]
        sparsifier.threshold.fill_(threshold)
        insert_sparsifier(model, name, sparsifier)
    return model


DATA = [torch.tensor([[1.0, -1.0, 2.0, 3.0]]), torch.tensor([[0.0, 4.0, -5.0, 1.5], [9.0, 9.0, 9.0, 9.0]])]


def test_zeros_are_counted_over_all_batches_and_weighted_by_bytes() -> None:
    report = measure_sparsity(make_three_layers(), DATA)
    first, second = report.layers
    # The first layer reads 12 entries, of which 1, -1, 0 and 1.5 are masked.
    assert (first.name, first.sparsity, first.weight_bytes) == ("0", 4 / 12, 32)
    # The second reads the outputs of the first, whose second channel is always zero.
    assert (second.name, second.sparsity, second.weight_bytes) == ("1", 3 / 6, 24)
    assert report.linear_bytes == 32 + 24 + 12
    assert report.sparsity == pytest.approx((32 / 3 + 24 / 2) / 56)
    assert report.weight_reads_skipped == pytest.approx((32 / 3 + 24 / 2) / 68)
    assert report.by_role == pytest.approx({"ffn.gate+ffn.up": 1 / 3, "other": 1 / 2})
    assert report.tokens == "all"


def test_the_report_as_a_dict_is_json_and_says_the_same() -> None:
    report = measure_sparsity(make_three_layers(), DATA)
    described = report.to_dict()
    assert described["sparsity"] == report.sparsity
    assert described["weight_reads_skipped"] == report.weight_reads_skipped
    assert {name: layer["sparsity"] for name, layer in described["by_layer"].items()} == {"0": 1 / 3, "1": 1 / 2}


def test_batch_sizes_do_not_matter() -> None:
    assert measure_sparsity(make_three_layers(), [torch.cat(DATA)]) == measure_sparsity(make_three_layers(), DATA)


def test_counting_changes_nothing(llama: Any, batches: list[Any], snapshot: Any) -> None:
    llama.model.layers[0].train()
    sparsify_activations(llama, batches, 0.5)
    before = snapshot(llama)
    measure_sparsity(llama, batches)
    assert snapshot(llama) == before


def test_zeros_are_counted_while_the_model_does_something_else(llama: Any, batches: list[Any]) -> None:
    sparsify_activations(llama, batches, 0.5)
    expected = measure_sparsity(llama, batches[:1])
    with count_zeros(llama) as counter:
        logits = llama(**batches[0]).logits
    assert counter.report() == expected
    assert torch.equal(logits, llama(**batches[0]).logits)


def test_compressed_weights_count_as_stored(make_model: Any, batches: list[Any], compress: Any) -> None:
    dense = measure_sparsity(sparsify_activations(make_model(), batches, 0.5), batches)
    small = measure_sparsity(sparsify_activations(compress(make_model()), batches, 0.5), batches)
    assert [x.name for x in small.layers] == [x.name for x in dense.layers]
    assert all(a.weight_bytes * 4 == b.weight_bytes for a, b in zip(small.layers, dense.layers, strict=True))
    assert small.weight_reads_skipped == pytest.approx(dense.weight_reads_skipped, abs=0.01)


def test_decode_masks_show_in_decode_forwards_only(llama: Any, batches: list[Any], make_batches: Any) -> None:
    sparsify_activations(llama, batches, 0.5, tokens="decode")
    prefill = measure_sparsity(llama, batches)
    assert (prefill.tokens, prefill.sparsity) == ("decode", 0.0)
    decode = measure_sparsity(llama, make_batches(8, batch_size=2, length=1))
    assert decode.sparsity == pytest.approx(0.5, abs=0.15)


def test_masks_of_both_kinds_are_both_named(llama: Any, batches: list[Any]) -> None:
    sparsify_activations(llama, batches, {TargetScope(roles=("ffn.up",)): 0.5})
    sparsify_activations(llama, batches, {TargetScope(roles=("ffn.down",)): 0.5}, tokens="decode", keep_existing=True)
    assert measure_sparsity(llama, batches).tokens == "all+decode"


def test_a_model_without_masks_is_refused(llama: Any, batches: list[Any]) -> None:
    with pytest.raises(ActsparseError, match="the model has no activation sparsifiers to measure"):
        measure_sparsity(llama, batches)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DatasetError, match="empty"):
        measure_sparsity(make_three_layers(), [])


def test_a_batch_that_does_not_fit_is_named_and_no_hook_stays(snapshot: Any) -> None:
    model = make_three_layers()
    before = snapshot(model)
    with pytest.raises(DatasetError, match="batch 1 of the dataset"):
        measure_sparsity(model, [DATA[0], torch.ones(1, 5)])
    assert snapshot(model) == before


def test_a_masked_layer_that_no_data_reaches_is_named() -> None:
    model = make_three_layers()
    model.add_module("3", nn.Identity())
    unused = nn.Linear(2, 2)
    insert_sparsifier(unused, "", ActivationSparsifier(0.5))
    model.get_submodule("3").add_module("unused", unused)
    with pytest.raises(ActsparseError, match=r"the sparsity of layer 3\.unused cannot be measured"):
        measure_sparsity(model, DATA)


def test_nothing_measured_is_no_division_by_zero() -> None:
    assert SparsityReport((), 1, "all").sparsity == 0.0


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_masks_take_about_their_share_of_the_calibration_data(
    target: float, architecture: str, make_model: Any, make_batches: Any
) -> None:
    batches = make_batches(4, batch_size=4, length=48)
    model = sparsify_activations(make_model(architecture), batches, target)
    layers = measure_sparsity(model, batches).layers
    thresholds = {name: s.threshold.item() for name, s in named_sparsifiers(model)}
    # Nothing masked comes before the first site, so the quantile of its input is exact.
    assert layers[0].sparsity == pytest.approx(target, abs=0.002)
    for layer in layers:
        # Further down, calibration masks each sequence by itself; here, every sequence at the pooled threshold.
        assert layer.sparsity > target - 0.03
        assert layer.sparsity < target + 0.03 or math.isclose(thresholds[layer.name], 0.0)
