"""`actsparse regress`: exit codes, tables, files, and mistakes."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actsparse import cli
from actsparse.commands.regression import job
from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.figures import SPARSE, CaseResult, loss_figures
from actsparse.commands.regression.measure import measure_case
from actsparse.commands.regression.reference import read_reference
from actsparse.errors import SourceError

pytestmark = pytest.mark.slow

WriteCase = Callable[..., Path]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["actsparse", "regress", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture
def measure_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Measure in this process; what is given is added to the masked model's loss per token."""

    def start(worse: float) -> None:
        def measure(path: Path, git: dict[str, Any]) -> CaseResult:
            result = replace(measure_case(read_case(path), lambda _: None), git=git)
            losses = zip(result.windows.losses[SPARSE], result.windows.tokens, strict=True)
            raised = result.windows.losses | {SPARSE: tuple(loss + worse * tokens for loss, tokens in losses)}
            windows = replace(result.windows, losses=raised)
            return replace(result, windows=windows, figures=result.figures | loss_figures(windows))

        monkeypatch.setattr(job, "measure_apart", measure)

    start(0.0)
    return start


def ignore_times(path: Path) -> None:
    """Let the times of a tiny model be what they are."""
    path.write_text(path.read_text().replace("relative: 0.5", "relative: 1000"))


def test_a_regression_is_exit_code_1_and_an_update_accepts_it(
    monkeypatch: pytest.MonkeyPatch, write_case: WriteCase, measure_here: Any, tmp_path: Path, capsys: Any
) -> None:
    path, reference, figures = write_case("small"), tmp_path / "reference.yaml", tmp_path / "figures.json"
    options = ("--reference", reference)
    assert run(monkeypatch, path, *options, "--update", "the first\n figures") == 0
    assert read_reference(reference).updates[-1].reason == "the first figures"
    ignore_times(reference)
    stored = next((tmp_path / "reference.results").iterdir())
    stored.write_text(re.sub('"nncf": "[0-9.]+"', '"nncf": "1.0"', stored.read_text()))
    # By name, and all: the same model and data give the same figures.
    assert run(monkeypatch, "small", *options) == 0
    assert "small: the reference was measured with nncf 1.0, this with 3" in capsys.readouterr().err
    measure_here(0.05)
    capsys.readouterr()
    assert run(monkeypatch, *options, "--json", figures) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "word perplexity" in line and "dense" not in line and "regression" in line]
    outcome = json.loads(figures.read_text())
    assert outcome["is_regression"] is True
    verdicts = {row["name"]: row["verdict"] for row in outcome["cases"]["small"]["differences"]}
    assert verdicts["word_perplexity"] == "regression"
    assert verdicts["dense_word_perplexity"] == verdicts["sparsity"] == "ok"
    assert run(monkeypatch, *options, "--update", "slower, but smaller") == 0
    assert run(monkeypatch, *options) == 0
    measure_here(0.0)
    assert run(monkeypatch, *options) == 0
    assert "improvement" in capsys.readouterr().out


def test_a_changed_setting_is_no_regression_but_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, write_case: WriteCase, measure_here: Any, tmp_path: Path, capsys: Any
) -> None:
    reference = tmp_path / "reference.yaml"
    path = write_case("changed")
    assert run(monkeypatch, path, "--reference", reference, "--update", "first") == 0
    before = reference.read_bytes()
    write_case("changed", "seed: 1")
    capsys.readouterr()
    assert run(monkeypatch, path, "--reference", reference) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert "changed is not what the reference was made of: seed was as by default and is 1" in last
    assert captured.out == ""
    write_case("other")
    assert run(monkeypatch, path.with_stem("other"), "--reference", reference) == 2
    assert "has no case 'other'; nearest: changed" in capsys.readouterr().err
    assert reference.read_bytes() == before


def test_a_history_is_kept_and_drawn(
    monkeypatch: pytest.MonkeyPatch, write_case: WriteCase, measure_here: Any, tmp_path: Path, capsys: Any
) -> None:
    history = tmp_path / "history"
    assert run(monkeypatch, "--history", history) == 2
    assert run(monkeypatch, write_case("small"), "--history", history) == 0
    assert "word perplexity" in capsys.readouterr().out
    (history / "small.png").unlink()
    assert run(monkeypatch, "--history", history) == 0
    assert (history / "small.png").is_file()
    assert len(list((history / "small").iterdir())) == 1
    # Figures that took hours are told before anything is drawn of them, and a damaged history before they are measured.
    monkeypatch.setattr(job, "draw_history", fail_to_draw)
    capsys.readouterr()
    assert run(monkeypatch, write_case("small"), "--history", history) == 2
    captured = capsys.readouterr()
    assert "word perplexity" in captured.out
    assert captured.err.splitlines()[-1] == "error: no drawing today"
    next((history / "small").iterdir()).write_text("{}")
    monkeypatch.setattr(job, "measure_apart", pytest.fail)
    assert run(monkeypatch, write_case("small"), "--history", history) == 2
    assert "lacks the key" in capsys.readouterr().err


def fail_to_draw(_: Path) -> None:
    msg = "no drawing today"
    raise SourceError(msg)


def test_what_was_measured_before_a_case_failed_is_kept(
    monkeypatch: pytest.MonkeyPatch, write_case: WriteCase, measure_here: Any, tmp_path: Path
) -> None:
    impossible = write_case("worse", "sparsity: null\ntargets: [{names: [nothing], sparsity: 0.5}]")
    assert run(monkeypatch, write_case("better"), impossible, "--history", tmp_path / "history") == 2
    assert [path.parent.name for path in tmp_path.glob("history/*/*.json")] == ["better"]


def test_a_history_and_a_reference_in_the_checkout_are_no_changes_of_it(
    monkeypatch: pytest.MonkeyPatch, write_case: WriteCase, measure_here: Any, files: Path
) -> None:
    path = write_case("small")
    git = ["git", "-C", str(files), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    written = ("--reference", files / "r.yaml", "--update", "why", "--history", files / "history")

    def commit() -> None:
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", "a state"], check=True)

    subprocess.run([*git, "init", "--quiet"], check=True)
    commit()
    assert run(monkeypatch, path, *written) == 0
    assert read_reference(files / "r.yaml").updates[-1].is_dirty is False
    commit()
    for changed, is_dirty in (("r.yaml", False), ("evaluation.txt", True)):
        with (files / changed).open("a") as file:
            file.write("\n")
        assert run(monkeypatch, path, *written) == 0
        assert read_reference(files / "r.yaml").updates[-1].is_dirty is is_dirty
    names = {path.stem[12:] for path in (files / "history" / "small").glob("*.json")}
    assert names == {"", "-dirty"}
    assert len(list((files / "history" / "small").glob("*.json"))) == 3


def test_a_case_is_measured_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, write_case: WriteCase, tmp_path: Path, capsys: Any
) -> None:
    figures = tmp_path / "figures.json"
    # A module of the working folder is not the library of its name.
    (tmp_path / "yaml.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, write_case("apart"), "--json", figures) == 0
    result = json.loads(figures.read_text())["cases"]["apart"]
    assert (result["git"]["commit"] is None) or len(result["git"]["commit"]) == 40
    here = measure_case(read_case(write_case("apart")), lambda _: None)
    assert result["figures"]["word_perplexity"]["value"] == pytest.approx(
        here.figures["word_perplexity"].value, rel=1e-5
    )
    assert run(monkeypatch, write_case("apart", "sparsity: null\ntargets: [{names: [nothing], sparsity: 0.5}]")) == 2
    assert "error: " in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_process_that_ends_without_an_answer_is_unexpected(
    monkeypatch: pytest.MonkeyPatch, write_case: WriteCase, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    assert run(monkeypatch, write_case("small")) == 70
    assert "ended with code 1 and no figures" in capsys.readouterr().err


def test_an_interrupted_run_says_so_in_one_line(write_case: WriteCase, tmp_path: Path) -> None:
    reference = tmp_path / "reference.yaml"
    command = [sys.executable, "-m", "actsparse", "regress", str(write_case("long")), "--reference", str(reference)]
    process = subprocess.Popen([*command, "--update", "why"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("loading"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in errors
    assert not reference.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a case's file"),
        (("x.yaml", "--update", "why"), "give --reference FILE too"),
        (("x.yaml", "--reference", "{out}/r.yaml", "--update", " "), "takes the reason"),
        (("--reference", "{out}/r.yaml"), "there is no reference"),
        (("--reference", "{out}/" + 300 * "r"), "File name too long"),
        (("--reference", "{out}/r.yaml", "--update", "why"), "has no cases yet"),
        (("{out}/none.yaml",), "No such file"),
        (("a/x.yaml", "b/x.yaml"), "two cases named 'x'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, arguments: tuple[str, ...], message: str
) -> None:
    assert run(monkeypatch, *(argument.format(out=tmp_path) for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""
    assert not any(tmp_path.iterdir())
