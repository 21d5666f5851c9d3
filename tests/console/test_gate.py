"""The perplexity gate: what passes it, and what a run that does not leaves behind."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from actsparse import cli
from actsparse.commands.sparsify import SparsifyJob
from actsparse.console.gate import Verdict, require_limit
from actsparse.console.report import to_json
from actsparse.errors import ActsparseError


def run(monkeypatch: pytest.MonkeyPatch, files: Path, out: Path, *options: str | Path) -> int:
    texts = ("--calibration", files / "calibration.txt", "--batches", "2", "--text", files / "evaluation.txt")
    arguments = ("--out", out, "--algorithm", "magnitude", "--max-length", "64", *texts, *options)
    monkeypatch.setattr(sys, "argv", ["actsparse", "sparsify", str(files / "model"), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    ("increase", "has_passed"), [(-0.1, True), (0.05, True), (0.0501, False), (math.inf, False), (math.nan, False)]
)
def test_what_is_within_the_limit_passes_and_what_is_not_a_number_never_does(increase, has_passed):
    verdict = Verdict(0.05, increase, "a text")
    assert verdict.has_passed is has_passed
    assert ("within" if has_passed else "beyond") in str(verdict)
    assert json.loads(to_json(verdict.to_dict()))["has_passed"] is has_passed


@pytest.mark.parametrize("limit", [-0.01, math.nan, math.inf])
def test_a_limit_is_a_share(limit):
    with pytest.raises(ActsparseError, match="--fail-above is .*; it must be a share of 0 or more"):
        require_limit("--fail-above", limit)


@pytest.mark.parametrize(
    ("options", "message"), [({}, "give --text"), ({"text": "default", "recover": 10}, "recover first")]
)
def test_a_gate_wants_a_text_and_weights_that_stay(options: dict[str, Any], message, tmp_path):
    with pytest.raises(ActsparseError, match=message):
        SparsifyJob("default", tmp_path, sparsity=0.5, fail_above=0.05, **options)


def test_a_gate_that_is_passed_changes_nothing_but_the_report(monkeypatch, files, tmp_path, capsys):
    assert run(monkeypatch, files, tmp_path, "--sparsity", "0.5", "--fail-above", "0.5") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    before, after = (row["token_perplexity"] for row in report["rows"])
    assert report["gate"]["has_passed"] is True
    assert report["gate"]["perplexity_increase"] == pytest.approx(after / before - 1)
    assert (tmp_path / "thresholds.safetensors").is_file()


def test_a_gate_that_fails_leaves_the_report_and_nothing_to_deploy(monkeypatch, files, tmp_path, capsys):
    # An earlier run's files, and somebody else's.
    assert run(monkeypatch, files, tmp_path, "--sparsity", "0.1") == 0
    (tmp_path / "thresholds of mine.safetensors").write_text("kept")
    options = ("--sparsity", "0.8", "--fail-above", "0", "--accelerate", "--json", "-")
    capsys.readouterr()
    assert run(monkeypatch, files, tmp_path, *options) == 1
    captured = capsys.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(captured.out) == report
    assert report["gate"]["has_passed"] is False
    assert report["gate"]["perplexity_increase"] > 0
    assert captured.err.splitlines()[-1].startswith("failed: token perplexity on evaluation.txt grew by")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"report.json", "report.md", "sparsity_by_layer.png", "thresholds of mine.safetensors"}


@pytest.mark.parametrize("limit", ["0", "100"])
@pytest.mark.parametrize("is_ours", [True, False])
def test_only_an_openvino_model_that_an_earlier_run_made_is_removed(monkeypatch, files, tmp_path, is_ours, limit):
    # Its masks are not those of this run, whether the gate lets that pass or not.
    for name in ("openvino_model.xml", "openvino_model.bin"):
        (tmp_path / name).write_text("a model")
    (tmp_path / "report.json").write_text(json.dumps({"acceleration": {}} if is_ours else {}))
    assert run(monkeypatch, files, tmp_path, "--sparsity", "0.8", "--fail-above", limit, "--quiet") == (limit == "0")
    assert (tmp_path / "openvino_model.xml").exists() is not is_ours
    assert (tmp_path / "openvino_model.bin").exists() is not is_ours
