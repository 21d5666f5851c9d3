"""What a process may lack: a home folder, UTF-8, room behind its output; and paths of every kind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actsparse.cli import main
from actsparse.errors import ActsparseError, OutputError, SourceError
from actsparse.runtime.process import explain_output_errors, require_encodable, stand_in_for_home
from actsparse.storage import assets

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Python knows a home folder from $HOME or from the user's entry; a container's user may have neither.
WITHOUT_ENTRY = """
import pwd
def find_no_entry(uid):
    raise KeyError(uid)
pwd.getpwuid = find_no_entry
from actsparse.cli import main
main()
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
ODD = "ä b'c\"d $x$ [e] [/f]"


def run(folder: Path, environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command in an empty environment, whose user has no entry."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", WITHOUT_ENTRY, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def sparsify(files: Path, out: Path | str) -> list[str | Path]:
    texts = ["--calibration", files / "calibration.txt", "--batches", "2", "--text", files / "evaluation.txt"]
    command = ["sparsify", files / "model", "--out", out, "--sparsity", "0.5", "--algorithm", "magnitude"]
    return [*command, *texts, "--max-length", "64", "--json", f"{out}.json"]


def test_without_a_home_folder_and_in_ascii_a_command_works(files: Path, tmp_path: Path) -> None:
    done = run(tmp_path, ASCII, *sparsify(files, "out"))
    assert done.returncode == 0, done.stderr
    assert "| dense  |        ? |" in done.stdout
    # What the terminal cannot show, files can.
    assert "| dense | – | – |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.json"]


def test_in_a_read_only_home_and_with_odd_paths_a_command_works(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / ODD
    shutil.copytree(files, folder / ".hidden")
    (folder / ".hidden" / "model").rename(folder / ".hidden" / "–model")
    (folder / ".hidden" / "model").symlink_to("–model")
    done = run(folder, {"HOME": "/proc/home", "LC_ALL": "C.UTF-8"}, *sparsify(folder / ".hidden", f".out {ODD[:7]}"))
    assert done.returncode == 0, done.stderr
    assert ODD in done.stdout
    rows = json.loads((folder / f".out {ODD[:7]}.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["dense", "sparse"]


def test_a_name_that_the_locale_cannot_say_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(sys, "argv", ["actsparse", "evaluate", "é"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "set PYTHONUTF8=1, or a UTF-8 locale" in errors


def test_names_are_refused_where_python_does_not_use_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    require_encodable(["a", "é"])
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    require_encodable(["a", "--b"])
    with pytest.raises(ActsparseError, match="'é' cannot be used in a locale of encoding iso8859-1"):
        require_encodable(["a", "é"])


@pytest.mark.parametrize("home", ["/proc/home", "/dev/null"])
def test_a_home_folder_that_cannot_be_written_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", home)
    for name in ("ACTSPARSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SourceError, match="set ACTSPARSE_CACHE to another folder") as caught:
        assets.fetch_text("wiki")
    assert "\n" not in str(caught.value)


def test_a_home_folder_that_there_is_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stand_in_for_home()
    assert Path.home() == tmp_path


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_without_room_is_told_in_one_line() -> None:
    program = "from actsparse.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", program, "doctor"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: cannot write to standard output: No space left on device"


def test_what_can_be_printed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with explain_output_errors():
        print("x")
    assert capsys.readouterr().out == "x\n"
    assert issubclass(OutputError, ActsparseError)
