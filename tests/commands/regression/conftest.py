"""Made-up results, and cases beside the tiny model of `files`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actsparse.commands.regression.case import Case, read_case
from actsparse.commands.regression.figures import DENSE, SPARSE, CaseResult, Figure, Windows, loss_figures

SMALL = """
model: model
sparsity: 0.5
calibration: {text: calibration.txt, batches: 3, length: 32}
evaluation: {text: evaluation.txt, max_length: 64}
"""


@pytest.fixture
def write_case(files: Path) -> Callable[..., Path]:
    """Write a case beside the tiny model; more lines replace or add keys."""

    def write(name: str, more: str = "") -> Path:
        keys = {line.split(":")[0] for line in more.splitlines()}
        kept = [line for line in SMALL.strip().splitlines() if line.split(":")[0] not in keys]
        path = files / f"{name}.yaml"
        path.write_text("\n".join([*kept, more]) + "\n")
        return path

    return write


@pytest.fixture
def small_case(write_case: Callable[..., Path]) -> Case:
    return read_case(write_case("small"))


@pytest.fixture
def make_result() -> Callable[..., CaseResult]:
    """Make a result of twenty windows; `worse` is added to the masked model's loss per token, and shaken by `noise`."""

    def make(worse: float = 0.0, noise: float = 0.0, *, seed: int = 0, name: str = "small", **given: Any) -> CaseResult:
        tokens = np.arange(30.0, 50.0)
        hardness = np.random.default_rng(7).normal(3, 0.5, 20)
        shaken = noise * np.random.default_rng(seed).normal(size=20)
        sparse = (hardness + 0.4 + worse + shaken) * tokens
        losses = {DENSE: tuple((hardness * tokens).tolist()), SPARSE: tuple(sparse.tolist())}
        windows = Windows(600, tuple(tokens.tolist()), losses)
        others = {"sparsity": Figure(given.pop("sparsity", 0.5)), "calibration_ratio": Figure(given.pop("ratio", 1.0))}
        git = {"commit": given.pop("commit", "a" * 40), "is_dirty": False, "committed_at": given.pop("when", None)}
        inputs = {"model": "model"}
        when = "2026-11-22T12:00:00+00:00"
        details = {"calibration_seconds": 2.0, "forward_seconds": 1.5}
        return CaseResult(name, inputs, loss_figures(windows) | others, {}, windows, details, git, {}, when)

    return make
