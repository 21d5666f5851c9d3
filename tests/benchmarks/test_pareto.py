"""Bits and sparsity side by side: what is listed, and what the bars compare."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("pareto", "llama_cpp", "bars", "command", "real_models", "workload")


@pytest.fixture
def pareto(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("pareto")
    for name in MODULES:
        sys.modules.pop(name, None)


def make_point(name: str, loss: float, milliseconds: float, *, is_dense: bool) -> dict[str, Any]:
    return {
        "name": name,
        "is_dense": is_dense,
        "loss_increase": loss,
        "loss_increase_interval": [loss - 0.01, loss + 0.01],
        "measured_sparsity": 0.0 if is_dense else 0.4,
        "decode_ms": milliseconds,
        "first_token_ms": 50.0,
        "disk": 1e8,
        "peak": None,
    }


def test_every_kind_of_weights_has_dense_forms_and_all_masks(pareto: Any) -> None:
    found = pareto.list_candidates("int4", ("magnitude", "auto"), (0.2, 0.5))
    assert len({candidate.name for candidate in found}) == len(found) == 6
    assert [bool(candidate.algorithm) for candidate in found] == [False, False, True, True, True, True]


def test_the_fastest_within_each_budget_are_compared(pareto: Any) -> None:
    points = [
        make_point("dense INT8", 0.001, 10.0, is_dense=True),
        make_point("dense INT4", 0.08, 6.0, is_dense=True),
        make_point("kernel", 0.005, 8.0, is_dense=False),
        make_point("masks", 0.02, 5.0, is_dense=False),
    ]
    bars = pareto.make_bars("qwen", "Qwen", points)
    assert [bar.measured for bar in bars] == [pytest.approx(x) for x in (10 / 8, 10 / 5, 6 / 5)]
    assert [bar.limit for bar in bars] == [1.0, 1.15, 1.3]
    # What is judged on one model is a figure on the others.
    assert [bar.limit for bar in pareto.make_bars("default", "default", points)] == [None] * 3
    # A budget that nothing meets on one side is left out.
    assert len(pareto.make_bars("qwen", "Qwen", points[1:])) == 1
    assert all(math.isfinite(bar.measured) for bar in pareto.make_figures("Qwen", points))
