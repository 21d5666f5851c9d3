"""The perturbation allocation: trials that move all parts at once, on a model whose divergence is known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from actsparse.algorithms import ALLOCATIONS, Attribution, LayerGroup, Movement
from actsparse.algorithms.perturbation import SPREAD, TRIALS
from actsparse.algorithms.statistics import MagnitudeSketch

ROLES = ("attention.qkv", "attention.out", "ffn.gate", "ffn.down")
GROUPS = [LayerGroup(f"{i}.{role}", (f"{i}.{role}",), 64, (1e4,), role=role) for i in range(4) for role in ROLES]
SKETCH = MagnitudeSketch.of(torch.randn(20000, generator=torch.Generator().manual_seed(0)))


class Additive:
    """A model whose divergence is a sum over parts of their cost times the energy that is left out."""

    def __init__(self, costs: Mapping[str, float], noise: float = 0.0, loss_costs: Mapping[str, float] | None = None):
        self._loss_costs = loss_costs
        self._costs = costs
        self._noise = noise
        self._generator = torch.Generator().manual_seed(5)
        self.trials: list[Sequence[Mapping[str, float]]] = []

    def sketches(self, _importance: Any) -> dict[str, MagnitudeSketch]:
        return dict.fromkeys(self._costs, SKETCH)

    def attributions(self, sparsity: Mapping[str, float], _importance: Any, _part: Any) -> dict[str, Attribution]:
        # A gradient that says nothing.
        return {name: Attribution((1.0, -1.0, 0.5), 1.0) for name in sparsity}

    def count_batches(self, part: tuple[int, int]) -> int:
        assert part == (1, 4)
        return 8

    def divergences(self, trials: Any, _importance: Any, _part: Any) -> list[list[Movement]]:
        self.trials += trials
        return [[Movement(self.divergence(way) * self._draw(), self.loss(way)) for way in row] for row in trials]

    def divergence(self, sparsity: Mapping[str, float]) -> float:
        return add_up(self._costs, sparsity)

    def loss(self, sparsity: Mapping[str, float]) -> float:
        return add_up(self._loss_costs, sparsity) if self._loss_costs else math.nan

    def _draw(self) -> float:
        return float((self._noise * torch.randn((), generator=self._generator)).exp())


def add_up(costs: Mapping[str, float], sparsity: Mapping[str, float]) -> float:
    return sum(cost * SKETCH.quantile(sparsity[name]) ** 3 for name, cost in costs.items())


def allocate(name: str, model: Additive, target: float = 0.5) -> dict[str, float]:
    return ALLOCATIONS[name]([(target, GROUPS)], model, {})  # type: ignore[arg-type]


COSTS = {part.site: 4.0 if part.role == "ffn.down" else 1.0 for part in GROUPS}


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_trials_find_what_the_gradient_does_not(noise: float) -> None:
    model = Additive(COSTS, noise)
    sparsity = allocate("perturbation", model)
    without = allocate("attribution", model)
    assert model.divergence(sparsity) < 0.95 * model.divergence(without)
    down = [sparsity[part.site] for part in GROUPS if part.role == "ffn.down"]
    others = [sparsity[part.site] for part in GROUPS if part.role != "ffn.down"]
    assert max(down) < min(others)


def test_what_costs_the_text_gives_less_though_predictions_stay_where_they_are() -> None:
    flat = dict.fromkeys(COSTS, 1.0)
    alike, told = (allocate("perturbation", Additive(flat, loss_costs=costs)) for costs in (flat, COSTS))
    down = [part.site for part in GROUPS if part.role == "ffn.down"]
    assert all(told[site] < alike[site] - 0.02 for site in down)


def test_every_trial_meets_the_target_or_moves_it_as_it_says() -> None:
    model = Additive(COSTS)
    sparsity = allocate("perturbation", model)
    assert sum(sparsity.values()) / len(GROUPS) == pytest.approx(0.5, abs=1e-3)
    assert [len(row) for row in model.trials] == [TRIALS] * 8
    means = [sum(way.values()) / len(GROUPS) for row in model.trials for way in row]
    assert all(abs(abs(mean - 0.5) - SPREAD) < 1e-3 for mean in means)
    # As many above as below, in each batch.
    assert all(sum(sum(way.values()) / len(GROUPS) > 0.5 for way in row) == TRIALS / 2 for row in model.trials)


def test_the_same_model_gives_the_same_shares() -> None:
    assert allocate("perturbation", Additive(COSTS, 0.1)) == allocate("perturbation", Additive(COSTS, 0.1))


@pytest.mark.parametrize("target", [0.005, 0.995])
def test_targets_near_the_ends_are_met(target: float) -> None:
    sparsity = allocate("perturbation", Additive(COSTS), target)
    assert sum(sparsity.values()) / len(GROUPS) == pytest.approx(target, abs=1e-3)


def test_a_model_that_nothing_moves_keeps_its_shares() -> None:
    model = Additive(dict.fromkeys(COSTS, 0.0))
    assert allocate("perturbation", model) == pytest.approx(allocate("attribution", model), abs=1e-9)
