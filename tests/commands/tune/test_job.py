"""`actsparse tune` on a tiny model: what it writes, that it goes on where it was, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from actsparse import tune
from actsparse.commands.tune import job as tune_job
from actsparse.commands.tune import workshop
from actsparse.commands.tune.candidates import KERNEL, Candidate
from actsparse.commands.tune.job import TuneJob, run_tune
from actsparse.commands.tune.results import TuneReport
from actsparse.errors import ActsparseError, SourceError
from actsparse.models import load_model
from actsparse.openvino.acceleration import is_accelerated
from actsparse.openvino.toolchain import BuildError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:  # noqa: ARG001
    monkeypatch.setattr(workshop, "TIMED_TOKENS", 6)
    monkeypatch.setattr(workshop, "WINDOW", 64)
    monkeypatch.setattr(tune_job, "WINDOWS", 4)
    monkeypatch.setattr(tune_job, "LEAST_WINDOWS", 1)


def options(files: Path, **others: Any) -> dict[str, Any]:
    texts = {"text": str(files / "evaluation.txt"), "calibration": str(files / "calibration.txt")}
    return {**texts, "num_batches": 4, "algorithm": "magnitude", "weights": ("int8",), **others}


def test_it_writes_the_fastest_within_the_limit_and_goes_on_after_a_kill(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = tmp_path / "out", []
    write = workshop.Workshop.write

    def die(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(workshop.Workshop, "write", die)
    with pytest.raises(KeyboardInterrupt):
        tune(str(files / "model"), out, say=said.append, max_perplexity_increase=0.5, **options(files))
    assert not (out / "openvino_model.xml").exists()
    monkeypatch.setattr(workshop.Workshop, "write", write)
    # All has been measured: the second run may not score, time or calibrate.
    for name in ("measure_losses", "time_decoding", "calibrate"):
        monkeypatch.setattr(workshop, name, die)
    report = tune(str(files / "model"), out, max_perplexity_increase=0.5, **options(files))
    assert report.chosen.loss is not None
    assert report.chosen.loss <= 0.41
    assert report.chosen.speed is not None
    timed = [row.speed.decode for row in report.rows if row.speed and row.loss is not None and row.loss <= 0.405]
    assert report.chosen.speed.decode == min(timed)
    found = json.loads((out / "tune.json").read_text())
    assert found["chosen"]["name"] == report.chosen.candidate.name
    assert found["reason"]
    assert (out / "tune.png").stat().st_size > 0
    assert not (out / "tune.unfinished").exists()
    # What is written is what was chosen.
    model = load_model(str(out)).model.model
    assert is_accelerated(model) == (report.chosen.candidate.engine == KERNEL)
    assert (out / "thresholds.safetensors").exists() == bool(report.chosen.candidate.algorithm)


def test_without_a_compiler_it_tunes_what_can_run(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        msg = "no C++ compiler"
        raise BuildError(msg)

    monkeypatch.setattr(workshop, "extension_path", fail)
    report: TuneReport = run_tune(TuneJob(str(files / "model"), tmp_path / "out", **options(files)), print)
    assert report.chosen.candidate == Candidate("int8")
    assert "no C++ compiler" in "\n".join(report.to_lines())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_perplexity_increase": 0}, "positive"),
        ({"max_perplexity_increase": -1.0}, "positive"),
        ({"max_perplexity_increase": float("nan")}, "positive"),
        ({"weights": ("int3",)}, "nearest"),
        ({"weights": ("int8", "int8")}, "twice"),
        ({"weights": ()}, "at least one"),
        ({"minutes": 0.0}, "--minutes"),
        ({"num_batches": 0}, "--batches"),
        ({"algorithm": "magnitud"}, "nearest"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(
    wrong: dict[str, Any], message: str, files: Path, tmp_path: Path
) -> None:
    with pytest.raises(ActsparseError, match=message):
        tune(str(files / "model"), tmp_path / "out", **options(files, **wrong))
    assert not (tmp_path / "out").exists()


def test_texts_that_are_too_short_and_models_that_are_converted_are_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceError, match="has no tokenizer"):
        tune("1b", tmp_path / "out", **options(files))
    monkeypatch.setattr(tune_job, "LEAST_WINDOWS", 1000)
    with pytest.raises(SourceError, match="too short"):
        tune(str(files / "model"), tmp_path / "out", **options(files))
