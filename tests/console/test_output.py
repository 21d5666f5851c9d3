"""What commands say, and where: the same for every command."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from actsparse import cli
from actsparse.console.output import STANDARD_OUTPUT, Output
from actsparse.console.report import to_json
from actsparse.errors import ActsparseError, OutputError
from actsparse.runtime.process import EXIT_CODES_HELP, ExitCode
from actsparse.runtime.progress import progress_bar, shows_progress, status_console

pytestmark = pytest.mark.slow

FIGURES = {"perplexity": 12.5, "rows": [{"name": "dense"}]}


def make_table() -> Table:
    table = Table("model", title="Figures")
    table.add_row("dense")
    return table


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["actsparse", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def command_line(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "actsparse", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def every_command() -> list[Any]:
    return cli.app.registered_commands


@pytest.mark.parametrize("command", every_command(), ids=lambda command: command.callback.__name__)
def test_every_command_takes_quiet_and_json(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, command.callback.__name__, "--help") == 0
    printed = capsys.readouterr().out
    assert "--quiet" in printed
    assert "--json" in printed


def test_results_go_to_standard_output_and_what_happens_to_standard_error(capsys):
    with Output() as output:
        output.say("working")
        print("a library talks")
        output.finish(make_table(), "a line", figures=FIGURES)
        output.say("written")
    captured = capsys.readouterr()
    assert "dense" in captured.out
    assert captured.out.endswith("a line\n")
    assert "library" not in captured.out
    assert captured.err == "working\na library talks\nwritten\n"


def test_json_on_standard_output_is_all_that_is_there(capsys):
    with Output(STANDARD_OUTPUT) as output:
        output.say("working")
        output.finish(make_table(), figures=FIGURES)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == FIGURES
    assert "dense" in captured.err


@pytest.mark.parametrize("place", [None, STANDARD_OUTPUT, Path("figures.json")], ids=["no JSON", "-", "a file"])
def test_a_quiet_command_says_nothing_but_its_json(place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with Output(place, is_quiet=True) as output:
        assert status_console().quiet
        output.say("working")
        with progress_bar("calibrating", total=1) as advance:
            advance(1)
        output.finish(make_table(), figures=FIGURES)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == (to_json(FIGURES) if place == STANDARD_OUTPUT else "")
    assert [path.name for path in tmp_path.iterdir()] == (["figures.json"] if place and place.name != "-" else [])


def test_quiet_hides_progress_on_a_terminal_and_only_while_it_lasts(monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert shows_progress()
    with Output(is_quiet=True):
        assert not shows_progress()
        assert os.environ["TQDM_DISABLE"] == "1"
    assert shows_progress()
    assert "TQDM_DISABLE" not in os.environ


def test_what_cannot_be_a_json_number_becomes_null():
    contents = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf, 2)], "c": {"d": "NaN", "e": True}}
    assert json.loads(to_json(contents)) == {"a": None, "b": [None, 1.5, [None, 2]], "c": {"d": "NaN", "e": True}}


def test_a_json_file_gets_its_folder(tmp_path):
    path = tmp_path / "new" / "figures.json"
    with Output(path) as output:
        output.finish(figures=FIGURES)
    assert json.loads(path.read_text()) == FIGURES


@pytest.mark.parametrize("place", [".", "file/figures.json", "/dev/null"])
def test_a_json_file_that_cannot_be_written_is_told_before_the_work(place, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=place if place != "." else "no regular file"):
        Output(Path(place))
    assert run(monkeypatch, "doctor", "--json", place) == ExitCode.MISTAKE
    assert len(capsys.readouterr().err.splitlines()) == 1


LONG = "x" * 300
TOO_LONG = [
    ("doctor", "--json", LONG),
    ("doctor", "--json", f"{LONG}/figures.json"),
    ("evaluate", LONG),
    ("evaluate", f"./{LONG}"),
    ("evaluate", "{files}/model", "--thresholds", LONG),
    ("evaluate", "{files}/model", "--text", f"{LONG}.txt"),
    ("sparsify", f"./{LONG}", "--out", "out", "--sparsity", "0.5"),
    ("sparsify", "{files}/model", "--out", LONG, "--sparsity", "0.5", "--calibration", "{files}/calibration.txt"),
    ("bench", f"./{LONG}"),
    ("bench", "tiny", "--plot", LONG),
    ("attribution", "{files}/model", "--out", "out", "--questions", f"{LONG}.csv"),
    ("inspect", "--checkpoints", f"{LONG}*/x", "--out", "out"),
    ("tasks", "{files}/model", "--tasks", "piqa", "--include", LONG),
]


@pytest.mark.parametrize("arguments", TOO_LONG, ids=lambda arguments: " ".join(arguments).replace(LONG, "LONG"))
def test_a_path_that_the_system_refuses_to_look_at_is_a_mistake_in_one_line(
    arguments, files, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(argument.format(files=files) for argument in arguments)) == ExitCode.MISTAKE
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert LONG in last


def test_libraries_in_c_and_child_processes_cannot_write_into_the_json():
    program = """
import ctypes, subprocess
from pathlib import Path
from actsparse.console.output import Output
with Output(Path("-")) as output:
    ctypes.CDLL(None).printf(b"from C\\n")
    subprocess.run(["echo", "from a child"])
    output.finish(figures={"a": 1})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"a": 1}
    assert "from C\n" in done.stderr
    assert "from a child\n" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_standard_output_is_a_mistake_in_one_line():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "actsparse", "doctor", "--json", "-", "--quiet"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == ExitCode.MISTAKE
    assert done.stderr == "error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(("options", "code"), [("", (0, 1)), ("--json -", (2,))], ids=["tables", "JSON"])
def test_a_closed_standard_output_is_no_surprise(options, code):
    command = f"{shlex.quote(sys.executable)} -m actsparse doctor {options} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode in code
    assert done.stderr == ("error: --json - is for standard output, which is closed\n" if options else "")


def test_doctor_gives_json_and_nothing_else(monkeypatch):
    # Of a toolkit without a GPU, a build of torch for CUDA speaks.
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    done = command_line("doctor", "--quiet", "--json", "-")
    assert done.stderr == ""
    assert done.returncode == (0 if json.loads(done.stdout)["is_accelerated"] else ExitCode.CHECK_FAILED)


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        (ActsparseError("x is 2; it must be\n1"), ExitCode.MISTAKE, "error: x is 2; it must be 1"),
        (RuntimeError("a bug"), ExitCode.UNEXPECTED, "error: this is unexpected"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "error: interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("quiet", [(), ("--quiet",)], ids=["", "quiet"])
def test_each_kind_of_failure_has_its_exit_code_and_is_told_even_where_quiet(
    monkeypatch, capsys, error, code, last_line, quiet
):
    def fail() -> None:
        raise error

    monkeypatch.setattr("actsparse.openvino.doctor.diagnose", fail)
    assert run(monkeypatch, "doctor", *quiet) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(last_line)
    assert ("Traceback" in captured.err) == (code == ExitCode.UNEXPECTED)
    assert not shows_progress.__globals__["_is_hidden"].get()


def test_an_interruption_while_python_makes_a_class_has_its_exit_code_too(tmp_path):
    # Where Ctrl-C comes while a dataclass is made, CPython notes it, and `python -m` ends with the signal.
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from actsparse import cli\n"
        "from actsparse.openvino import doctor\n"
        "doctor.diagnose = lambda: exec('raise KeyboardInterrupt')\n"
        "sys.argv = ['actsparse', 'doctor']\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("error: interrupted")
    assert done.returncode == ExitCode.INTERRUPTED


def test_a_failed_check_ends_with_1_and_says_which(monkeypatch, capsys):
    with pytest.raises(Exception) as stop, Output(is_quiet=True) as output:
        output.fail("perplexity grew by 9%")
    assert getattr(stop.value, "exit_code", None) == ExitCode.CHECK_FAILED == 1
    assert capsys.readouterr().err == "failed: perplexity grew by 9%\n"


def test_the_exit_codes_are_those_that_the_help_and_the_documentation_promise(monkeypatch, capsys):
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0, "CHECK_FAILED": 1, "MISTAKE": 2, "UNEXPECTED": 70, "INTERRUPTED": 130, "TERMINATED": 143
    }  # fmt: skip
    assert run(monkeypatch, "--help") == 0
    assert "Exit codes: 0 done; 1 a check failed" in " ".join(capsys.readouterr().out.split())
    page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    for code in ExitCode:
        assert f" {int(code)} " in EXIT_CODES_HELP
        assert f"| {int(code)} |" in page


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("actsparse 0.")
