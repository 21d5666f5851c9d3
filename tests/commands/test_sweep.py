"""A sweep: points at equal measured sparsity, none of them measured twice."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from actsparse.algorithms import get_algorithm
from actsparse.calibration import Settings
from actsparse.cli import app
from actsparse.commands import common, sweep
from actsparse.commands.sweep import Sweep, SweepJob, parse_sparsities, run_sweep
from actsparse.console.report import print_result
from actsparse.errors import ActsparseError
from actsparse.evaluation import comparison

pytestmark = pytest.mark.slow


@pytest.fixture
def job(files: Path, tmp_path: Path) -> SweepJob:
    return SweepJob(
        model=str(files / "model"),
        out=tmp_path / "out",
        algorithms=("magnitude", "fisher"),
        sparsities=(0.3, 0.5),
        calibration=str(files / "calibration.txt"),
        text=str(files / "evaluation.txt"),
        num_batches=2,
        max_length=64,
    )


def run(job: SweepJob) -> tuple[Sweep, list[str]]:
    said: list[str] = []
    return run_sweep(job, said.append), said


def test_points_are_compared_at_equal_measured_sparsity(job: SweepJob) -> None:
    result, _ = run(job)
    assert [(p["algorithm"], p["sparsity"]) for p in result.points] == [
        ("magnitude", 0.3), ("magnitude", 0.5), ("fisher", 0.3), ("fisher", 0.5)
    ]  # fmt: skip
    for point in result.points:
        assert point["measured_sparsity"] == pytest.approx(point["sparsity"], abs=sweep.TOLERANCE)
        assert 0 <= point["top1_agreement"] <= 1
        assert point["kl_divergence"] > 0
        low, high = point["loss_increase_interval"]
        assert low <= point["loss_increase"] <= high
    for sparsity in (0.3, 0.5):
        assert result.verdict(result.winner(sparsity)) == "best"
    # Gradients are measured once for both points of the algorithm.
    backwards = [p["calibration"]["new_backwards"] for p in result.points if p["algorithm"] == "fisher"]
    assert backwards[0] >= backwards[1] == 0
    assert {path.name for path in job.out.iterdir()} == {"points", "sweep.json", "frontier.png"}


def test_points_that_are_there_are_not_measured_again(job: SweepJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(job)
    paths = sorted((job.out / "points").iterdir())
    paths[0].unlink()
    paths[1].write_text("{ half a fi")
    again, said = run(job)
    assert sum("measured before" in line for line in said) == 2
    assert sum("of 2)" in line for line in said) == 2
    for before, after in zip(whole.points, again.points, strict=True):
        assert after["loss_increase"] == pytest.approx(before["loss_increase"], abs=1e-6)
    monkeypatch.setattr(sweep, "load_for_job", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    complete, _ = run(job)
    assert complete.points == again.points


@pytest.mark.parametrize("damage", ["{", '{"loss_increase": 1.0}'], ids=["half", "less"])
def test_a_point_that_cannot_be_used_is_measured_again(job: SweepJob, damage: str) -> None:
    before, _ = run(job)
    points = sorted((job.out / "points").iterdir())
    points[0].write_text(damage)
    again, said = run(job)
    assert sum("measured before" in line for line in said) == len(points) - 1
    # Not the very same: where the search for a target begins depends on the points that there are.
    expected = [point["loss_increase"] for point in before.points]
    assert [point["loss_increase"] for point in again.points] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_increase": None},
        {"loss_increase_interval": [None, 0.1]},
        {"window_losses": [None]},
        {"window_losses": None},
        {"measured_sparsity": "half"},
        {"kl_divergence": "much"},
        {"window_tokens": []},
        {"calibration_seconds": True},
    ],
    ids=str,
)
def test_a_point_with_no_number_where_one_belongs_is_measured_again(job: SweepJob, changes: dict[str, Any]) -> None:
    job = replace(job, algorithms=("magnitude",), sparsities=(0.5,))
    before, _ = run(job)
    (path,) = (job.out / "points").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    again, said = run(job)
    assert not any("measured before" in line for line in said)
    assert again.points[0]["loss_increase"] == pytest.approx(before.points[0]["loss_increase"], abs=1e-6)
    assert run(job)[1] == ["magnitude at 50.0% has been measured before"]


def test_a_word_perplexity_beyond_floats_is_a_dash_and_no_reason_to_measure_again(
    job: SweepJob, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a text without spaces.
    monkeypatch.setattr(comparison, "count_words", lambda _pages: 1)
    job = replace(job, algorithms=("magnitude",), sparsities=(0.5,))
    first, _ = run(job)
    again, said = run(job)
    assert said == ["magnitude at 50.0% has been measured before"]
    assert [result.points[0]["word_perplexity"] for result in (first, again)] == [math.inf, None]
    for result in (first, again):
        print_result(result.to_table())
        assert " – │" in capsys.readouterr().out


def test_a_model_that_overflows_leaves_no_point(job: SweepJob, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = comparison.score_window, []

    def overflow(*args: Any) -> Any:
        logits, targets = real(*args)
        calls.append(1)
        return logits * (math.nan if len(calls) > 1 else 1), targets

    monkeypatch.setattr(comparison, "score_window", overflow)
    with pytest.raises(ActsparseError, match="logits contain NaN on page 1 of 1"):
        run(job)
    assert not list((job.out / "points").iterdir())


def test_an_attempt_is_charged_with_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def spend(seconds: float) -> None:
        nonlocal now
        now += seconds

    def sparsify(_model: Any, _batches: Any, target: float, _ignored: Any, settings: Settings) -> None:
        settings.cache.get_or_measure("sketches", lambda: spend(1))
        settings.cache.get_or_measure(f"attributions {target}", lambda: spend(10))
        spend(0.5)

    monkeypatch.setattr(sweep, "calibrate", sparsify)
    settings, compare = Settings(get_algorithm("auto")), cast("Any", lambda: None)
    seconds = [sweep._attempt(None, [], settings, compare, (), target).seconds for target in (0.3, 0.4, 0.5, 0.4)]
    assert seconds == [11.5] * 4


def test_other_settings_are_other_points(job: SweepJob) -> None:
    run(job)
    _, said = run(SweepJob(**{**job.__dict__, "max_length": 32, "algorithms": ("magnitude",)}))
    assert not any("measured before" in line for line in said)


def test_a_retrained_model_and_another_version_are_measured_again(
    job: SweepJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(job.model, tmp_path / "model"))
    job = replace(job, model=str(folder), algorithms=("magnitude",), sparsities=(0.5,))
    before, _ = run(job)
    assert run(job)[1] == ["magnitude at 50.0% has been measured before"]
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2
    save_file(tensors, weights, {"format": "pt"})
    after, said = run(job)
    assert not any("measured before" in line for line in said)
    assert after.points[0]["window_losses"] != before.points[0]["window_losses"]
    monkeypatch.setattr(common, "version", lambda _name: "99")
    assert not any("measured before" in line for line in run(job)[1])


def test_an_interruption_keeps_the_points_before_it(job: SweepJob, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = sweep.compare_with_dense, []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sweep, "compare_with_dense", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    finished = list((job.out / "points").iterdir())
    assert 1 <= len(finished) < 4
    assert all(json.loads(path.read_text())["loss_increase"] for path in finished)
    monkeypatch.setattr(sweep, "compare_with_dense", real)
    _, said = run(job)
    assert sum("measured before" in line for line in said) == len(finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithms": ()}, "at least one algorithm"),
        ({"algorithms": ("magnitud",)}, "unknown algorithm"),
        ({"sparsities": (1.0,)}, "between 0 and 1, not 1.0"),
        ({"sparsities": (float("nan"),)}, "between 0 and 1"),
        ({"int8": "both"}, "--int8 is 'both'"),
    ],
)
def test_a_job_that_cannot_be_is_refused(job: SweepJob, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ActsparseError, match=message):
        SweepJob(**{**job.__dict__, **changes})


def test_sparsities_are_read_from_a_list() -> None:
    assert parse_sparsities("0.3, 0.5,") == (0.3, 0.5)
    with pytest.raises(ActsparseError, match="numbers between commas"):
        parse_sparsities("0.3;0.5")


def test_the_command_prints_a_table_and_writes_json(job: SweepJob, tmp_path: Path) -> None:
    arguments = ["sweep", job.model, "--out", str(tmp_path / "cli"), "--algorithms", "magnitude,wina"]
    arguments += ["--sparsity", "0.5", "--text", job.text, "--calibration", job.calibration, "--batches", "2"]
    done = CliRunner().invoke(app, [*arguments, "--max-length", "64", "--json", str(tmp_path / "sweep.json")])
    assert done.exit_code == 0, done.output
    assert "beside the best" in done.output
    assert json.loads((tmp_path / "sweep.json").read_text())["winners"].keys() == {"0.5"}
