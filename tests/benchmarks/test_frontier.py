"""The comparison of algorithms: several calibrations are judged by what they lose together."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actsparse.commands.sweep import Sweep
from actsparse.texts import load_pages

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def frontier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("frontier")
    for name in ("frontier", "bars", "command", "real_models", "workload"):
        sys.modules.pop(name)


def make_sweep(auto: list[float], magnitude: list[float]) -> Sweep:
    points = []
    for name, losses in (("auto", auto), ("magnitude", magnitude)):
        points.append(
            {
                "algorithm": name,
                "sparsity": 0.5,
                "measured_sparsity": 0.5,
                "loss_increase": sum(losses) / len(losses),
                "kl_divergence": 0.1,
                "calibration_seconds": 3.0,
                "window_losses": [1 + loss for loss in losses],
                "dense_window_losses": [1.0] * len(losses),
            }
        )
    return Sweep({}, tuple(points))


def test_draws_are_compared_by_what_they_lose_together(frontier: Any) -> None:
    limits = {0.5: (0.8, None)}
    low, high = make_sweep([1.0, 3.0], [4.0, 4.0]), make_sweep([4.0, 4.0], [4.0, 4.0])
    (once, *_) = frontier.make_bars("all", limits, [low])
    (same, *_) = frontier.make_bars("all", limits, [low, low, low])
    assert once.measured == same.measured == 0.5
    assert once.note.split("; draws")[0] == same.note.split("; draws")[0]
    (both, *_) = frontier.make_bars("all", limits, [low, high])
    assert both.measured == 0.75
    assert both.is_met
    assert both.note.endswith("; draws 0.50, 1.00")


def test_every_draw_calibrates_on_pages_of_its_own(frontier: Any, tmp_path: Path) -> None:
    packaged = load_pages("default", purpose="calibration").pages
    twice = {page for page in packaged if packaged.count(page) > 1}
    seen: set[str] = set()
    for draw in range(frontier.DRAWS):
        pages = load_pages(frontier.turn_pages(draw, tmp_path)).pages if draw else packaged
        assert sorted(pages) == sorted(packaged)
        # 32 x 256 tokens are less than 36,000 letters.
        used = {page for number, page in enumerate(pages) if sum(map(len, pages[:number])) < 36_000}
        assert used & seen <= twice
        seen |= used
