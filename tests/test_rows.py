"""Masks of rows on torch models: where the gate is small, a row of the up projection is useless."""

import copy
import pickle
from typing import Any

import pytest
import torch

from actsparse import (
    ActsparseError,
    TargetScope,
    load_thresholds,
    measure_sparsity,
    remove_sparsifiers,
    save_thresholds,
    sparsify_activations,
)
from actsparse.errors import ThresholdsError
from actsparse.torch.insertion import named_sparsifiers, placed_sparsifiers

ROWS = "magnitude+uniform+rows"
FFN = TargetScope(roles=("ffn.gate", "ffn.up", "ffn.down"))
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def one_batch(make_batches: Any) -> list[Any]:
    return make_batches(1, batch_size=1, length=48)


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_masked_rows_change_nothing(make_model: Any, one_batch: list[Any]) -> None:
    """Zeroing the rows' outputs on top of the mask is the same model: they need not be computed."""
    model = sparsify_activations(make_model(), one_batch, {TargetScope(roles=("ffn.up",)): 0.6}, algorithm=ROWS)
    expected = logits(model, one_batch[0])
    mlp = model.model.layers[0].mlp
    gates: list[torch.Tensor] = []
    mlp.act_fn.register_forward_hook(lambda _m, _a, output: gates.append(output))
    mlp.up_proj.register_forward_hook(lambda _m, _a, output: torch.where(gates[-1] == 0, 1e6, output))
    assert torch.equal(logits(model, one_batch[0]), expected)
    assert (gates[-1] == 0).float().mean() == pytest.approx(0.6, abs=0.005)


def test_they_are_reported_as_the_up_projection(make_model: Any, one_batch: list[Any]) -> None:
    model = sparsify_activations(make_model(), one_batch, {FFN: 0.5}, algorithm=ROWS)
    assert {name.rpartition(".")[2] for name, _ in placed_sparsifiers(model)} == {"gate_proj", "act_fn", "down_proj"}
    report = measure_sparsity(model, one_batch)
    layers = {layer.name: layer for layer in report.layers}
    assert len(layers) == 6
    assert layers[UP].roles == ("ffn.up",)
    assert layers[UP].sparsity == pytest.approx(0.5, abs=0.005)
    assert layers[UP].weight_bytes == model.get_submodule(UP).weight.numel() * 4
    # What masked rows leave out, the down projection reads as zeros.
    assert layers["model.layers.0.mlp.down_proj"].sparsity >= layers[UP].sparsity


def test_neurons_are_weighed_by_what_they_are_multiplied_by(make_model: Any, one_batch: list[Any]) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_submodule(UP).weight[:5] *= 100
    sparsify_activations(model, one_batch, {TargetScope(roles=("ffn.up",)): 0.5}, algorithm=ROWS)
    threshold = dict(named_sparsifiers(model))[UP].threshold
    assert threshold[:5].max() < 0.05 * threshold[5:].min()
    # CATS looks at the gate alone.
    sparsify_activations(model, one_batch, {TargetScope(roles=("ffn.up",)): 0.5}, algorithm="cats")
    assert dict(named_sparsifiers(model))[UP].threshold.ndim == 0


@pytest.mark.parametrize("again", ["magnitude", "cats", ROWS])
def test_calibrating_again_replaces_all_masks(again: str, make_model: Any, one_batch: list[Any]) -> None:
    fresh = sparsify_activations(make_model(), one_batch, 0.4, algorithm=again)
    model = sparsify_activations(make_model(), one_batch, 0.6, algorithm=ROWS)
    sparsify_activations(model, one_batch, 0.4, algorithm=again)
    assert [name for name, _ in placed_sparsifiers(model)] == [name for name, _ in placed_sparsifiers(fresh)]
    assert torch.equal(logits(model, one_batch[0]), logits(fresh, one_batch[0]))


def test_existing_masks_of_rows_are_kept_if_asked_for(make_model: Any, one_batch: list[Any]) -> None:
    model = sparsify_activations(make_model(), one_batch, {TargetScope(roles=("ffn.up",)): 0.5}, algorithm=ROWS)
    before = dict(named_sparsifiers(model))[UP].threshold.clone()
    down = {TargetScope(roles=("ffn.down",)): 0.7}
    sparsify_activations(model, one_batch, down, keep_existing=True)
    masks = dict(named_sparsifiers(model))
    assert torch.equal(masks[UP].threshold, before)
    assert "model.layers.0.mlp.down_proj" in masks
    # An input mask takes the place of a mask of rows: a layer has one mask.
    sparsify_activations(model, one_batch, {TargetScope(roles=("ffn.up",)): 0.5}, keep_existing=True)
    assert {name for name, mask in placed_sparsifiers(model) if mask.rows_of} == set()
    assert sorted(name for name, _ in named_sparsifiers(model)).count(UP) == 1


def test_a_failed_call_and_removal_leave_the_model_as_it_was(
    make_model: Any, one_batch: list[Any], snapshot: Any
) -> None:
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ActsparseError):
        sparsify_activations(model, [*one_batch, {"input_ids": torch.full((1, 2), 9999)}], 0.5, algorithm="auto")
    assert snapshot(model) == before
    sparsify_activations(model, one_batch, 0.5, algorithm="auto")
    assert snapshot(model) != before
    remove_sparsifiers(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_masks_of_rows_survive_copies(copied: Any, make_model: Any, one_batch: list[Any]) -> None:
    model = sparsify_activations(make_model(), one_batch, 0.5, algorithm=ROWS)
    expected = logits(model, one_batch[0])
    twin = copied(model)
    remove_sparsifiers(model)
    assert torch.equal(logits(twin, one_batch[0]), expected)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_thresholds_file_holds_them(
    compressed: bool, make_model: Any, compress: Any, one_batch: list[Any], tmp_path: Any
) -> None:
    model = compress(make_model()) if compressed else make_model()
    sparsify_activations(model, one_batch, 0.5, algorithm="auto")
    expected, report = logits(model, one_batch[0]), measure_sparsity(model, one_batch).to_dict()
    save_thresholds(model, tmp_path / "file")
    remove_sparsifiers(model)
    load_thresholds(model, tmp_path / "file")
    assert torch.equal(logits(model, one_batch[0]), expected)
    assert measure_sparsity(model, one_batch).to_dict() == report


def test_a_file_whose_activation_function_the_model_lacks_is_refused(
    make_model: Any, one_batch: list[Any], tmp_path: Any, snapshot: Any
) -> None:
    model = sparsify_activations(make_model(), one_batch, 0.5, algorithm=ROWS)
    save_thresholds(model, tmp_path / "file")
    other = make_model()
    for layer in other.model.layers:
        layer.mlp.function = layer.mlp.act_fn
        layer.mlp.forward = lambda x, m=layer.mlp: m.down_proj(m.function(m.gate_proj(x)) * m.up_proj(x))
        del layer.mlp.act_fn
    before = snapshot(other)
    with pytest.raises(ThresholdsError, match=r"the model has no activation function model\.layers\.0\.mlp\.act_fn"):
        load_thresholds(other, tmp_path / "file")
    assert snapshot(other) == before


def test_nncfs_average_masks_inputs_only(llama: Any, one_batch: list[Any]) -> None:
    with pytest.raises(ActsparseError, match=r"puts zeros into inputs: leave \+rows out"):
        sparsify_activations(llama, one_batch, 0.5, algorithm="magnitude+nncf-ema+rows")
