"""Recovery: less divergence on held-out data, the same masks, and nothing lost on the way."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from actsparse import TargetScope, measure_sparsity, sparsify_activations
from actsparse.errors import ActsparseError, DatasetError, SourceError
from actsparse.recovery import Recovery, recover
from actsparse.recovery.recover import _Trainer
from actsparse.torch.compression import compress_int8
from actsparse.torch.insertion import named_sparsifiers

OPTIONS: dict[str, Any] = {
    "steps": 12,
    "batches_per_step": 2,
    "evaluate_every": 4,
    "dtype": torch.float32,
    "learning_rate": 3e-3,
}


@pytest.fixture
def data(make_batches: Any) -> list[Any]:
    return make_batches(12, batch_size=2, length=24)


@pytest.fixture
def masked(make_model: Any, data: list[Any]) -> Any:
    return sparsify_activations(make_model(), data[:2], 0.5)


def run(model: Any, data: list[Any], **options: Any) -> Recovery:
    return recover(model, data, **{**OPTIONS, **options})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_unchanged(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("algorithm", ["magnitude", "wina", "fisher"])
def test_it_comes_nearer_to_the_dense_model_on_data_it_has_not_seen(
    algorithm: str, rank: int | None, make_model: Any, make_batches: Any
) -> None:
    data = make_batches(60, batch_size=4, length=32)
    model = sparsify_activations(make_model(), data[:2], 0.5, algorithm=algorithm)
    before, masks = weights(model), {name: m.threshold.clone() for name, m in named_sparsifiers(model)}
    found = run(model, data, rank=rank, steps=120, evaluate_every=20, learning_rate=2e-4 if rank is None else 2e-3)
    assert found.best.divergence < 0.99 * found.before.divergence
    after = weights(model)
    assert after.keys() == before.keys()
    # Weights of masked layers move; embeddings, norms and the head do not.
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{name}.weight" for name in masks
    }
    assert all(torch.equal(m.threshold, masks[name]) for name, m in named_sparsifiers(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert measure_sparsity(model, data[:2]).sparsity == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_model_is_left_at_its_best_look(rank: int | None, masked: Any, data: list[Any]) -> None:
    found = run(masked, data[:-2], held_out=data[-2:], rank=rank)
    # Looking again, before any training, sees the same.
    again = recover(masked, data[:-2], held_out=data[-2:], **{**OPTIONS, "steps": 1})
    dense_changed = again.before.divergence
    assert found.best.divergence <= found.before.divergence
    assert dense_changed > 0


@pytest.mark.parametrize("rank", [None, 4])
def test_interrupted_and_resumed_it_ends_where_it_would_have(
    rank: int | None, masked: Any, data: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = copy.deepcopy(masked), masked
    expected = run(whole, data, rank=rank)
    before = weights(parts)
    step = _Trainer._step

    def stop_at_ten(trainer: Any, number: int) -> None:
        if number == 10:
            raise KeyboardInterrupt
        step(trainer, number)

    monkeypatch.setattr(_Trainer, "_step", stop_at_ten)
    with pytest.raises(KeyboardInterrupt):
        run(parts, data, rank=rank, checkpoint=tmp_path / "state")
    assert_unchanged(parts, before)
    done: list[int] = []
    monkeypatch.setattr(_Trainer, "_step", lambda trainer, number: (done.append(number), step(trainer, number)))
    found = run(parts, data, rank=rank, checkpoint=tmp_path / "state")
    assert done == [8, 9, 10, 11]
    assert [x.step for x in found.looks] == [x.step for x in expected.looks]
    assert found.best.divergence == pytest.approx(expected.best.divergence, rel=1e-5)
    for (name, left), right in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6), name


class Branches(nn.Module):
    """A model whose second layer only some inputs reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.first(x)
        return ModelOutput(logits=self.second(hidden) if x.flatten()[0] > 0 else hidden)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("reached_by", [(), (8, 2)])  # those of steps 3 and 9
def test_a_layer_that_gets_no_gradient_stays_and_one_that_gets_it_late_goes_on(
    reached_by: tuple[int, ...], rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    inputs = [torch.rand(2, 3, 8).neg() for _ in range(12)]
    data = [-x if number in reached_by else x for number, x in enumerate(inputs)]
    whole = sparsify_activations(Branches(), [-inputs[0]], 0.5)
    parts, before = copy.deepcopy(whole), weights(whole)
    options = {"rank": rank, "batches_per_step": 1, "held_out": [-inputs[0]], "patience": 100, "evaluate_every": 2}
    expected = run(whole, data, **options)
    assert len(expected.looks) == 7
    if not reached_by:
        assert torch.equal(whole.second.weight, before["second.weight"])
    path, step = tmp_path / "state", _Trainer._step

    def stop(trainer: Any, number: int) -> None:
        if number == 7:
            raise KeyboardInterrupt
        step(trainer, number)

    monkeypatch.setattr(_Trainer, "_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(parts, data, checkpoint=path, **options)
    monkeypatch.setattr(_Trainer, "_step", step)
    assert [x.divergence for x in run(parts, data, checkpoint=path, **options).looks] == [
        x.divergence for x in expected.looks
    ]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_batches_that_reach_no_masked_layer_teach_nothing() -> None:
    model, reached = Branches(), torch.rand(2, 3, 8)
    sparsify_activations(model, [reached], {TargetScope(names=["second"]): 0.5})
    before = weights(model)
    found = run(model, [-reached] * 4, held_out=[reached])
    assert_unchanged(model, before)
    assert len({look.divergence for look in found.looks}) == 1


def test_a_finished_checkpoint_is_not_trained_again(masked: Any, data: list[Any], tmp_path: Path) -> None:
    again = copy.deepcopy(masked)
    first = run(masked, data, checkpoint=tmp_path / "state")
    second = run(again, data, checkpoint=tmp_path / "state")
    assert second.looks == first.looks
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(masked: Any, data: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "state"
    other = copy.deepcopy(masked)
    run(masked, data, checkpoint=path)
    before = weights(other)
    with pytest.raises(SourceError, match="other settings"):
        run(other, data, checkpoint=path, seed=1)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SourceError, match="no checkpoint of a recovery"):
        run(other, data, checkpoint=path)
    assert_unchanged(other, before)


def test_it_stops_when_nothing_is_gained(masked: Any, data: list[Any]) -> None:
    # A rate that does harm: no look is better than the first.
    before = weights(masked)
    found = run(masked, data, steps=40, evaluate_every=2, patience=2, learning_rate=0.5)
    assert found.steps < 40
    assert found.best == found.before
    assert_unchanged(masked, before)


def test_padding_counts_for_nothing(masked: Any, data: list[Any]) -> None:
    padded = []
    for batch in data:
        pad = torch.zeros(2, 5, dtype=torch.long)
        ids = torch.cat([batch["input_ids"], pad], 1)
        padded.append({"input_ids": ids, "attention_mask": torch.cat([torch.ones_like(batch["input_ids"]), pad], 1)})
    plain = run(copy.deepcopy(masked), data, steps=1)
    assert run(masked, padded, steps=1).before.divergence == pytest.approx(plain.before.divergence, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"batches_per_step": 1.5}, "batches_per_step is 1.5"),
        ({"learning_rate": 2.0}, "learning_rate is 2.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_an_impossible_setting_is_refused(options: Any, message: str, masked: Any, data: list[Any]) -> None:
    before = weights(masked)
    with pytest.raises(ActsparseError, match=message):
        run(masked, data, **options)
    assert_unchanged(masked, before)


def test_what_cannot_be_recovered_is_refused(make_model: Any, data: list[Any], masked: Any) -> None:
    with pytest.raises(ActsparseError, match="call sparsify_activations first"):
        run(make_model(), data)
    with pytest.raises(ActsparseError, match="not str"):
        run("model", data)
    with pytest.raises(DatasetError, match="one batch is too little"):
        run(masked, data[:1])
    with pytest.raises(DatasetError, match="empty"):
        run(masked, [])
    with pytest.raises(ActsparseError, match="give a rank"):
        run(sparsify_activations(make_model(dtype=torch.bfloat16), data[:2], 0.5), data)
    compressed = sparsify_activations(compress_int8(make_model(), "asym", data[0]), data[:2], 0.5)
    with pytest.raises(ActsparseError, match="recover first, then compress"):
        run(compressed, data)
    before = weights(masked)
    with pytest.raises(DatasetError, match="cannot take a batch"):
        run(masked, [{"ids": torch.zeros(1, 3)}] * 4)
    assert_unchanged(masked, before)
