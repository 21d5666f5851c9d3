"""A tiny shape, exported and measured once."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from actsparse.commands.bench import prepare
from actsparse.commands.bench.job import BenchJob, describe_report, draw_plot, run_bench
from actsparse.commands.bench.results import BenchReport
from actsparse.console.report import to_json
from actsparse.storage import assets

TINY = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    max_position_embeddings=256,
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def use_tiny_shape(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make `tiny` a built-in shape, and keep what is made of it in a cache of the session, but not the extension."""
    patch.setattr(assets, "cache_dir", lambda: cache)
    patch.setitem(prepare.SHAPES, "tiny", TINY)
    relu = copy.deepcopy(TINY)
    relu.hidden_act = "relu"
    patch.setitem(prepare.SHAPES, "tiny-relu", relu)


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    use_tiny_shape(monkeypatch, cache)


@dataclass(frozen=True)
class Measured:
    report: BenchReport
    result: dict[str, Any]
    said: tuple[str, ...]
    plot: Path


@pytest.fixture(scope="session")
def measured(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Two points of the tiny shape, measured once."""
    folder, said = tmp_path_factory.mktemp("bench"), []
    job = BenchJob(
        "tiny",
        ("0.3,0.7",),
        num_tokens=10,
        prompt_lengths=(8, 32),
        batch_sizes=(1, 3),
        num_batches=2,
        plot=folder / "bench.png",
    )
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_shape(patch, cache)
        report = run_bench(job, said.append)
    draw_plot(job, report)
    result = json.loads(to_json(describe_report(job, report)))
    return Measured(report, result, tuple(said), folder / "bench.png")
