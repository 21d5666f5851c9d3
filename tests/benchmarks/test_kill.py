"""Killed commands on a tiny model, and that the harness sees damage."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module("kill")
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            sys.modules.pop(name)


def test_killed_commands_leave_whole_files_and_run_again(files: Path, tmp_path: Path, own_cache: Path) -> None:
    # In a process of its own, which forks before it has threads.
    result = tmp_path / "kill.json"
    command = [sys.executable, str(FOLDER / "kill.py"), "--model", str(files / "model"), "--json", str(result)]
    command += ["--text", str(files / "calibration.txt"), "--commands", "sparsify,recover"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(
        [*command, "--moments", "1", "--operations", "1", "--batches", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trials = json.loads(result.read_text())["samples"]
    assert {name: len(tried) for name, tried in trials.items()} == dict.fromkeys(trials, 2)


@pytest.fixture
def finished(files: Path, tmp_path: Path, kill: Any) -> Path:
    """A folder as a command leaves it."""
    folder = tmp_path / "finished"
    folder.mkdir()
    for path in (files / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "report.json").write_text('{"rows": [1.5], "seconds": 3}')
    assert kill.find_faults(folder, None) == []
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "report.json", "tokenizer.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_half_a_file_is_found(kill: Any, finished: Path, name: str, share: float) -> None:
    data = (finished / name).read_bytes()
    (finished / name).write_bytes(data[: int(share * len(data))])
    assert any(fault.startswith(name) for fault in kill.find_faults(finished, finished))


def test_files_that_do_not_belong_there_are_found(kill: Any, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tmp1234").write_text("x")
    assert kill.find_faults(out, finished) == ["tmp1234 should not be there"]
    # An unfinished file is nobody's output after the kill, and has to be gone after the next run.
    (out / "tmp1234").rename(out / f"{kill.UNFINISHED}x")
    assert kill.find_faults(out, finished) == []
    assert any("is unfinished" in difference for difference in kill.find_differences(out, finished))
    assert "report.json is missing" in kill.find_differences(out, finished)


@pytest.mark.parametrize(
    ("changed", "is_equal"),
    [
        ({"rows": [1.5], "seconds": 4}, True),
        ({"rows": [1.500001]}, True),
        ({"rows": [1.51]}, False),
        ({"rows": [1.5, 2.0]}, False),
        ({"rows": [1.5], "more": 1}, False),
    ],
    ids=str,
)
def test_other_figures_are_found_and_other_times_are_not(kill: Any, changed: Any, is_equal: bool) -> None:
    assert kill.are_figures_equal({"rows": [1.5], "seconds": 3}, changed) is is_equal
