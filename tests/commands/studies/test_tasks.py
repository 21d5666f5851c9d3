"""Downstream tasks: the harness's own scores for both sides, paired example by example."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actsparse.cli import app
from actsparse.commands.studies.tasks import GROUPS, TasksJob, _find_tasks, compare_results, run_tasks
from actsparse.errors import ActsparseError

pytestmark = pytest.mark.slow

QUESTIONS = """\
Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
x,y,the of and?,to in a,to in a; is that; for,it was; with be,z
x,y,to in a is?,that for,that for,his but; at are,z
x,y,by on not?,he his,he his; but at,this have; from one,z
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks made of a CSV file by the example."""
    pytest.importorskip("lm_eval")
    (tmp_path / "q.csv").write_text(QUESTIONS, encoding="utf-8-sig")
    script = Path(__file__).parents[3] / "examples" / "truthfulqa" / "make_tasks.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "q.csv"), str(tmp_path / "tasks")])
    runpy.run_path(str(script), run_name="__main__")
    return tmp_path / "tasks"


@pytest.fixture
def masked(files: Path, tmp_path: Path) -> Path:
    out = tmp_path / "masked"
    arguments = ["sparsify", str(files / "model"), "--out", str(out), "--sparsity", "0.5", "--algorithm", "magnitude"]
    arguments += ["--calibration", str(files / "calibration.txt"), "--batches", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.filterwarnings("ignore")
def test_local_tasks_are_scored_on_both_sides(
    masked: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    json_file = tmp_path / "tasks.json"
    arguments = ["tasks", str(masked), "--tasks", "truthfulqa_mc1_local,truthfulqa_mc2_local", "--include", str(folder)]
    result = CliRunner().invoke(app, [*arguments, "--limit", "2", "--json", str(json_file)])
    assert result.exit_code == 0, result.output
    assert "fatal" not in capfd.readouterr().err
    report = json.loads(json_file.read_bytes())
    scores = {score["task"]: score for score in report["scores"]}
    assert scores.keys() == {"truthfulqa_mc1_local", "truthfulqa_mc2_local"}
    for score in scores.values():
        assert score["examples"] == 2
        assert 0 <= score["sparse"] <= 1
        assert score["difference"] == pytest.approx(score["sparse"] - score["dense"])
    assert scores["truthfulqa_mc2_local"]["difference"] != 0
    assert 0.3 < report["sparsity"]["sparsity"] < 0.7


def results(values: list[float], name: str = "acc") -> dict[str, Any]:
    samples = [{"doc_id": i, "filter": "none", name: value} for i, value in enumerate(values)]
    figures = {"alias": "t", f"{name},none": sum(values) / len(values), f"{name}_stderr,none": 0.1}
    return {"results": {"t": figures}, "samples": {"t": samples}}


def test_the_standard_error_is_that_of_the_difference() -> None:
    (score,) = compare_results(results([1, 0, 1, 1]), results([1, 0, 0, 1]))
    assert (score.dense, score.sparse, score.difference) == (0.75, 0.5, -0.25)
    # Differences 0, 0, -1, 0: variance 1/4 with n - 1.
    assert score.standard_error == pytest.approx(0.25)
    (same,) = compare_results(results([1, 0, 1]), results([1, 0, 1]))
    assert same.standard_error == 0


def test_a_metric_that_is_no_mean_over_examples_has_no_error() -> None:
    dense, sparse = results([1, 2]), results([2, 3])
    for side in (dense, sparse):
        side["samples"] = {}
    (score,) = compare_results(dense, sparse)
    assert score.standard_error is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": ()}, "--tasks needs"),
        ({"limit": 0}, "--limit is 0"),
        ({"batch": 0}, "--batch must be"),
        ({"include": Path("/nowhere")}, "is no folder of task files"),
    ],
)
def test_a_wrong_option_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ActsparseError, match=message):
        TasksJob(**{"model": "default", "tasks": ("piqa",), **changed})


@pytest.mark.filterwarnings("ignore")
def test_unknown_tasks_and_models_without_masks_are_refused(files: Path, folder: Path) -> None:
    with pytest.raises(ActsparseError, match="knows no task 'pica'; nearest: .*piqa"):
        run_tasks(TasksJob(str(files / "model"), ("pica",)), lambda _line: None)
    with pytest.raises(ActsparseError, match="has no masks"):
        run_tasks(TasksJob(str(files / "model"), ("truthfulqa_mc1_local",), include=folder), lambda _line: None)


@pytest.mark.filterwarnings("ignore")
def test_groups_name_tasks_that_the_harness_knows() -> None:
    pytest.importorskip("lm_eval")
    manager = _find_tasks(None)
    assert {name for names in GROUPS.values() for name in names} <= set(manager.all_tasks)
    assert TasksJob("default", ("truthfulqa-choice", "truthfulqa_mc1")).names == GROUPS["truthfulqa-choice"]
