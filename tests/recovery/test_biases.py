"""Recovery of biases alone: nearer to the dense model, all else as it was, whatever the weights are."""

import copy
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch

from actsparse import load_thresholds, save_thresholds, sparsify_activations
from actsparse.errors import ActsparseError
from actsparse.recovery import recover
from actsparse.recovery.recover import _Trainer
from actsparse.torch.compression import compress_weights
from actsparse.torch.insertion import named_sparsifiers

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"batches_per_step": 1, "dtype": torch.float32, "train": "bias", "evaluate_every": 5}


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("weights", [None, "int8_asym", "int4_asym"])
@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude+uniform+rows", "wina+bias"])
def test_it_comes_nearer_and_moves_nothing_but_biases(
    algorithm: str, weights: str | None, make_model: Any, make_batches: Any, tmp_path: Path
) -> None:
    data = make_batches(12, batch_size=2, length=24)
    model = make_model()
    if weights:
        model = compress_weights(model, weights, data[0], group_size=16)
    model = sparsify_activations(model, data[:2], 0.6, algorithm=algorithm)
    before = state(model)
    # Random models have nothing to learn that would hold for other data.
    found = recover(model, data, held_out=data, steps=25, learning_rate=0.04, patience=9, **OPTIONS)
    assert found.best.divergence < 0.99 * found.before.divergence
    after = state(model)
    assert all(torch.equal(after[name], before[name]) for name in before if not name.endswith(".bias"))
    masks = dict(named_sparsifiers(model))
    by_site = {mask.site: mask.bias for mask in masks.values() if mask.bias is not None}
    assert all((mask.bias is None) == bool(mask.rows_of) for mask in masks.values())
    assert all(torch.equal(mask.bias, by_site[mask.site]) for mask in masks.values() if mask.bias is not None)
    assert not any(mask.bias.requires_grad for mask in masks.values() if mask.bias is not None)
    # The thresholds file is all that is to be kept.
    save_thresholds(model, tmp_path / "file")
    with torch.no_grad():
        expected = model(**data[0]).logits
        for mask in masks.values():
            mask.bias = None
        assert torch.equal(load_thresholds(model, tmp_path / "file")(**data[0]).logits, expected)


def test_interrupted_it_leaves_the_masks_as_they_were_and_goes_on_later(
    make_model: Any, make_batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_batches(12, batch_size=2, length=24)
    whole = sparsify_activations(make_model(), data[:2], 0.6)
    parts = copy.deepcopy(whole)
    expected = recover(whole, data, steps=20, **OPTIONS)
    before, step = state(parts), _Trainer._step

    def stop_at_twelve(trainer: Any, number: int) -> None:
        if number == 12:
            raise KeyboardInterrupt
        step(trainer, number)

    monkeypatch.setattr(_Trainer, "_step", stop_at_twelve)
    with pytest.raises(KeyboardInterrupt):
        recover(parts, data, steps=20, checkpoint=tmp_path / "state", **OPTIONS)
    after = state(parts)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    monkeypatch.setattr(_Trainer, "_step", step)
    found = recover(parts, data, steps=20, checkpoint=tmp_path / "state", **OPTIONS)
    assert found.best.divergence == pytest.approx(expected.best.divergence, rel=1e-5)


def test_what_cannot_be_is_refused(make_model: Any, make_batches: Any) -> None:
    data = make_batches(4, batch_size=1, length=16)
    model = sparsify_activations(make_model(), data[:2], 0.5)
    with pytest.raises(ActsparseError, match="train is 'all'"):
        recover(model, data, train="all")
    with pytest.raises(ActsparseError, match="rank"):
        recover(model, data, train="bias", rank=2)
    for name, mask in named_sparsifiers(model):
        mask.rows_of = name
    with pytest.raises(ActsparseError, match="rows"):
        recover(model, data, train="bias")


def test_compressed_weights_are_no_weights_to_train(make_model: Any, make_batches: Any) -> None:
    data = make_batches(4, batch_size=1, length=16)
    model = sparsify_activations(make_model(), data[:2], 0.5)
    model = nncf.compress_weights(model, dataset=nncf.Dataset(data[:1]))
    with pytest.raises(ActsparseError, match="cannot be trained"):
        recover(model, data)
