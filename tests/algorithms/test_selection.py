"""The choice among algorithms: the least divergence on batches held out is taken, whatever its shares are."""

from typing import Any

import pytest

from actsparse.algorithms import CANDIDATES, Part, Plan, Way, get_algorithm, select
from actsparse.algorithms.algorithm import Algorithm


class Measured:
    """Measurements that know how far each way to mask lies off."""

    def __init__(self, divergences: dict[float, list[float]]) -> None:
        self._divergences = divergences
        self.asked = 0

    def count_batches(self, part: tuple[int, int]) -> int:
        assert part == (3, 4)
        return 2

    def divergences(self, trials: Any, _importance: Any, _part: Any) -> list[list[float]]:
        self.asked += 1
        return [[self._divergences[way["a"]][number] for way in row] for number, row in enumerate(trials)]


class Fixed(Algorithm):
    """An algorithm whose plan is its name."""

    def plan(self, scopes: Any, model: Any) -> Plan:  # noqa: ARG002
        shares = {"a": float(self.name)}
        return Plan(shares, {}, shares, {})


def way(name: str, model: Measured) -> Way:
    return Way(Fixed(name, "magnitude", "uniform"), [(0.5, [Part("a", ("a",), 8, (1.0,))])], model)  # type: ignore[arg-type]


def test_the_least_mean_divergence_is_taken_over_all_models() -> None:
    inputs = Measured({0.1: [3.0, 1.0], 0.2: [1.5, 1.5]})
    rows = Measured({0.3: [0.0, 2.5], 0.4: [9.0, 0.0]})
    ways = [way("0.1", inputs), way("0.2", inputs), way("0.3", rows), way("0.4", rows)]
    chosen, plan, selection = select(ways)
    assert chosen is ways[2]
    assert plan.sparsity == {"a": 0.3}
    assert selection.chosen == "0.3"
    assert selection.divergences == {"0.1": 2.0, "0.2": 1.5, "0.3": 1.25, "0.4": 4.5}
    assert selection.held_out == 2
    # What needs the same masks is run on the same batches, beside one run without masks.
    assert (inputs.asked, rows.asked) == (1, 1)
    assert "0.2 1.5000" in str(selection)


def test_a_tie_goes_to_the_plainest() -> None:
    model = Measured({0.1: [1.0, 1.0], 0.2: [1.0, 1.0]})
    assert select([way("0.1", model), way("0.2", model)])[2].chosen == "0.1"


def test_auto_tries_the_plainest_and_takes_options_to_the_chosen_one() -> None:
    auto = get_algorithm("auto+shift")
    assert [candidate.name for candidate in auto.candidates] == list(CANDIDATES)
    assert "magnitude" in CANDIDATES
    assert auto.stand_in == "shift"
    assert not any(candidate.stand_in or candidate.candidates for candidate in auto.candidates)
    assert all(not get_algorithm(name).candidates for name in CANDIDATES)


@pytest.mark.parametrize("name", CANDIDATES)
def test_without_rows_is_an_algorithm_by_its_name(name: str) -> None:
    assert get_algorithm(name).without_rows() == get_algorithm(name.replace("+rows", ""))
