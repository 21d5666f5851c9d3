"""The search for the fastest candidate within a loss, on models whose losses and speeds are formulas."""

import math
from collections.abc import Callable

import pytest

from actsparse.commands.tune.candidates import KERNEL, Candidate
from actsparse.commands.tune.search import ENOUGH, LEAST_STEP, MOST_STEPS, MOST_TRAININGS, Found, Line, Search

LINES = {"int8": Line(10.0, -8.0), "int4": Line(7.0, -4.0)}


def search(
    limit: float,
    mask_loss: Callable[[float], float],
    dense: dict[str, float] | None = None,
    best: Candidate | None = None,
    milliseconds: float = math.inf,
    seconds: int = 100,
    recover: int = 0,
    recovered: float = 0.7,
) -> Found:
    """Search a model whose losses add up."""
    left = [seconds]
    losses = dense or {"int8": 0.002, "int4": 0.05}

    def measure(candidate: Candidate) -> float:
        left[0] -= 1
        assert candidate.engine == KERNEL
        factor = recovered if candidate.recover else 1.0
        return losses[candidate.weights] + factor * mask_loss(candidate.sparsity)

    running = Search(limit, losses, LINES, "auto", recover=recover, measure=measure, has_time=lambda: left[0] > 0)
    return running.run(best, milliseconds)


@pytest.mark.parametrize("limit", [0.01, 0.03, 0.1, 0.4])
@pytest.mark.parametrize(("scale", "power"), [(0.8, 2.0), (1.6, 3.0), (5.0, 4.0), (0.05, 1.5)])
def test_it_ends_near_the_limit_within_it_after_few_measurements(limit: float, scale: float, power: float) -> None:
    def beyond(sparsity: float) -> float:
        return 0.002 + scale * (sparsity + 2 * LEAST_STEP) ** power

    found = search(limit, lambda s: scale * s**power, {"int8": 0.002})
    assert found.best is not None
    loss = 0.002 + scale * found.best.sparsity**power
    assert loss <= limit
    # As near as another step would have brought it; or as sparse as is tried.
    assert loss > ENOUGH * limit - 0.002 or beyond(found.best.sparsity) > limit or found.best.sparsity > 0.85
    assert len(found.tried) <= 6


def test_the_kind_of_weights_that_ends_faster_wins() -> None:
    # INT4 at the limit reads less than INT8 at the limit, though it begins with a loss.
    found = search(0.2, lambda s: 1.6 * s**3)
    assert found.best is not None
    assert found.best.weights == "int4"
    # Where it begins beyond the limit it is never masked.
    found = search(0.04, lambda s: 1.6 * s**3)
    assert {tried.candidate.weights for tried in found.tried} == {"int8"}


def test_what_cannot_win_is_not_measured() -> None:
    dense = Candidate("int4")
    found = search(0.01, lambda s: 1.6 * s**3, {"int8": 0.002}, best=dense, milliseconds=4.0)
    assert found.best == dense
    assert not found.tried
    assert "more speed" in found.reason


@pytest.mark.parametrize("limit", [0.001, 0.002])
def test_without_room_nothing_is_measured(limit: float) -> None:
    found = search(limit, lambda s: s)
    assert (found.best, found.tried) == (None, [])
    assert "room" in found.reason


def test_it_ends_when_the_time_is_up_or_nothing_makes_sense() -> None:
    assert search(0.1, lambda s: 5 * s**4, {"int8": 0.0}, seconds=1).reason == "the time was up"
    # Masks that gain: noise, on a short text.
    found = search(0.1, lambda s: -0.01 * s)
    assert found.best is not None
    assert len(found.tried) <= MOST_STEPS
    # Few masks that gain, as where rounding is noise: the end is as near to the limit all the same.
    found = search(0.03, lambda s: 1.6 * s**3 - 0.01, {"int8": 0.009})
    assert found.best is not None
    assert 1.6 * (found.best.sparsity + 2 * LEAST_STEP) ** 3 - 0.001 > ENOUGH * 0.03 - 0.002
    # A loss like a cliff.
    found = search(0.1, lambda s: 0.0001 if s < 0.3 else 5.0, {"int8": 0.0})
    assert len(found.tried) <= MOST_STEPS
    assert all(a.candidate != b.candidate for a, b in zip(found.tried, found.tried[1:], strict=False))


@pytest.mark.parametrize("recovered", [0.5, 0.7, 0.8])
def test_training_comes_last_and_makes_room_for_more(recovered: float) -> None:
    plain = search(0.05, lambda s: 1.6 * s**3, {"int8": 0.002})
    found = search(0.05, lambda s: 1.6 * s**3, {"int8": 0.002}, recover=60, recovered=recovered)
    steps = [tried.candidate.recover for tried in found.tried]
    assert steps == sorted(steps)
    assert 1 <= steps.count(60) <= MOST_TRAININGS
    assert found.best is not None
    assert plain.best is not None
    assert found.best.recover == 60
    assert found.best.sparsity > plain.best.sparsity


def test_training_that_brings_nothing_changes_nothing() -> None:
    plain = search(0.05, lambda s: 1.6 * s**3, {"int8": 0.002})
    found = search(0.05, lambda s: 1.6 * s**3, {"int8": 0.002}, recover=60, recovered=3.0)
    assert found.best == plain.best
    assert found.tried[: len(plain.tried)] == plain.tried
