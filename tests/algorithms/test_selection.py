"""The choice among algorithms: on batches held out, the least divergence of those that lose about the least."""

import math
from typing import Any

import pytest

from actsparse.algorithms import CANDIDATES, LayerGroup, Movement, Plan, Way, get_algorithm, select
from actsparse.algorithms.algorithm import Algorithm


class Measured:
    """Measurements that know how far each way to mask lies off; the loss is not known but where it is given."""

    def __init__(self, divergences: dict[float, list[float]], losses: dict[float, list[float]] | None = None) -> None:
        self._divergences = divergences
        self._losses = losses or {share: [math.nan] * len(found) for share, found in divergences.items()}
        self.asked = 0

    def count_batches(self, part: tuple[int, int]) -> int:
        assert part == (3, 4)
        return len(next(iter(self._divergences.values())))

    def divergences(self, trials: Any, _importance: Any, _part: Any) -> list[list[Movement]]:
        self.asked += 1
        return [[self._movement(way["a"], number) for way in row] for number, row in enumerate(trials)]

    def _movement(self, share: float, batch: int) -> Movement:
        return Movement(self._divergences[share][batch], self._losses[share][batch])


class Fixed(Algorithm):
    """An algorithm whose plan is its name."""

    def plan(self, scopes: Any, model: Any) -> Plan:  # noqa: ARG002
        shares = {"a": float(self.name)}
        return Plan(shares, {}, shares, {})


def way(name: str, model: Measured) -> Way:
    return Way(Fixed("magnitude", "uniform", name=name), [(0.5, [LayerGroup("a", ("a",), 8, (1.0,))])], model)  # type: ignore[arg-type]


def test_the_least_mean_divergence_is_taken_over_all_models() -> None:
    inputs = Measured({0.1: [3.0, 1.0], 0.2: [1.5, 1.5]})
    rows = Measured({0.3: [0.0, 2.5], 0.4: [9.0, 0.0]})
    ways = [way("0.1", inputs), way("0.2", inputs), way("0.3", rows), way("0.4", rows)]
    chosen, plan, selection = select(ways)
    assert chosen is ways[2]
    assert plan.sparsity == {"a": 0.3}
    assert selection.chosen == "0.3"
    assert selection.divergences == {"0.1": 2.0, "0.2": 1.5, "0.3": 1.25, "0.4": 4.5}
    assert selection.losses == {}
    assert selection.held_out == 2
    # What needs the same masks is run on the same batches, beside one run without masks.
    assert (inputs.asked, rows.asked) == (1, 1)
    assert "0.2 1.5000" in str(selection)


# In the first the second way loses 0.3 more with a standard error of 0.1, in the second with one of 0.4.
@pytest.mark.parametrize(
    ("losses", "chosen"),
    [([0.3, 0.1, 0.5, 0.3], "0.1"), ([0.3, 1.5, -0.9, 0.3], "0.2"), ([-0.3, -0.1, -0.5, -0.3], "0.2")],
)
def test_the_least_divergence_is_taken_of_those_that_lose_about_the_least(losses: list[float], chosen: str) -> None:
    model = Measured({0.1: [2.0] * 4, 0.2: [1.0] * 4}, {0.1: [0.0] * 4, 0.2: losses})
    selection = select([way("0.1", model), way("0.2", model)])[2]
    assert selection.chosen == chosen
    assert selection.losses == {"0.1": 0.0, "0.2": pytest.approx(sum(losses) / 4)}


@pytest.mark.parametrize("loss", [0.5, math.nan])
def test_one_batch_has_no_standard_error_and_the_divergence_decides(loss: float) -> None:
    model = Measured({0.1: [2.0], 0.2: [1.0]}, {0.1: [0.0], 0.2: [loss]})
    assert select([way("0.1", model), way("0.2", model)])[2].chosen == "0.2"


def test_a_tie_goes_to_the_plainest() -> None:
    model = Measured({0.1: [1.0, 1.0], 0.2: [1.0, 1.0]})
    assert select([way("0.1", model), way("0.2", model)])[2].chosen == "0.1"


def test_auto_tries_the_plainest_and_takes_options_to_the_chosen_one() -> None:
    auto = get_algorithm("auto+shift")
    assert [candidate.name for candidate in auto.candidates] == list(CANDIDATES)
    assert "magnitude" in CANDIDATES
    assert auto.compensation == "shift"
    assert not any(candidate.compensation or candidate.candidates for candidate in auto.candidates)
    assert all(not get_algorithm(name).candidates for name in CANDIDATES)


@pytest.mark.parametrize("name", CANDIDATES)
def test_without_rows_is_an_algorithm_by_its_name(name: str) -> None:
    assert get_algorithm(name).without_rows() == get_algorithm(name.replace("+rows", ""))
