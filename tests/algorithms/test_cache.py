"""What has been measured: nothing twice, and each calibration is charged with what it asks for."""

import time
from collections.abc import Callable

import pytest
import torch

from actsparse.algorithms import MeasurementCache, name_measurement


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], float]:
    """Let time pass on a clock that otherwise stands."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def pass_by(seconds: float) -> float:
        nonlocal now
        now += seconds
        return seconds

    return pass_by


def test_nothing_is_measured_twice() -> None:
    known = MeasurementCache()
    assert known.get_or_measure("a", lambda: 1) == 1
    assert known.get_or_measure("a", lambda: pytest.fail("measured again")) == 1


def test_a_calibration_reuses_what_it_asks_for_and_earlier_ones_measured(spend: Callable[[float], float]) -> None:
    known = MeasurementCache()
    known.begin()
    known.get_or_measure("both", lambda: spend(1))
    known.get_or_measure("only the first", lambda: spend(10))
    assert known.reused_seconds == 0
    known.begin()
    known.get_or_measure("both", lambda: spend(1))
    known.get_or_measure("only the second", lambda: spend(100))
    known.get_or_measure("only the second", lambda: spend(100))
    assert known.reused_seconds == 1


def test_what_a_measurement_needs_is_part_of_it_and_counts_once(spend: Callable[[float], float]) -> None:
    def inner() -> float:
        return known.get_or_measure("inner", lambda: spend(1))

    def outer() -> float:
        return spend(10) + inner()

    known = MeasurementCache()
    known.get_or_measure("outer", outer)
    for names, seconds in (({"outer"}, 11), ({"inner"}, 1), ({"inner", "outer"}, 11)):
        known.begin()
        for name in names:
            known.get_or_measure(name, lambda: pytest.fail("measured again"))
        assert known.reused_seconds == seconds


def test_a_measurement_that_fails_leaves_nothing(spend: Callable[[float], float]) -> None:
    known = MeasurementCache()
    with pytest.raises(ZeroDivisionError):
        known.get_or_measure("a", lambda: spend(5) / 0)
    known.begin()
    assert known.get_or_measure("a", lambda: spend(1)) == 1
    assert known.reused_seconds == 0


def test_a_name_is_short_and_of_one_thing_alone() -> None:
    importance = {"a": torch.ones(100_000), "b": torch.ones(())}
    other = {"a": torch.ones(100_000), "b": torch.ones(())}
    other["a"][77_777] = torch.nextafter(torch.ones(()), torch.tensor(2.0))
    swapped = {"a": importance["b"], "b": importance["a"]}
    sparsity = {"a": 0.5, "b": 0.25}
    depends_on = [
        (),
        (importance,),
        (other,),
        (swapped,),
        (importance, sparsity),
        (importance, {"a": 0.25, "b": 0.5}),
        ([[sparsity], [sparsity]],),
        ([[sparsity, sparsity]],),
        ((1.0, 10.5),),
        ((1.01, 0.5),),
    ]
    names = [name_measurement("sketches", *values) for values in depends_on]
    assert len({*names, name_measurement("divergences", importance)}) == len(depends_on) + 1
    assert max(map(len, names)) < 100
    same = {name: tensor.clone() for name, tensor in reversed(importance.items())}
    assert name_measurement("sketches", same) == name_measurement("sketches", importance)
