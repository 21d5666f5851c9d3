"""The same command gives the same files, to the bit: twice in a folder, and in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actsparse import cli

pytestmark = pytest.mark.slow

RUNS = {
    "magnitude": ("--sparsity", "0.5", "--algorithm", "magnitude"),
    "auto": ("--sparsity", "0.5", "--algorithm", "auto", "--int8", "asym"),
    "fisher": ("--role", "ffn.down=0.5", "--target", ".*up_proj.*=0.3", "--algorithm", "fisher", "--int8", "sym"),
    "r-sparse": ("--sparsity", "0.5", "--algorithm", "r-sparse"),
}
MEASURED_ANEW = {"calibration_seconds", "evaluation_seconds", "peak_memory"}


def arguments_of(name: str, files: Path, out: Path) -> list[str]:
    texts = ("--calibration", files / "calibration.txt", "--batches", "4", "--text", files / "evaluation.txt")
    return ["sparsify", str(files / "model"), "--quiet", "--out", str(out / name), *map(str, texts), *RUNS[name]]


def run(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["actsparse", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in MEASURED_ANEW}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files.pop("report.md")  # the report's figures again, seconds among them
    return files | {"report.json": without_times(json.loads(files["report.json"]))}


@pytest.fixture(scope="module")
def elsewhere(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run in one other process, whose hashes are other ones."""
    out = tmp_path_factory.mktemp("elsewhere")
    program = """
import json, sys
from actsparse.cli import app
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
"""
    wanted = json.dumps([arguments_of(name, files, out) for name in RUNS])
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, wanted], check=True, env=environment, timeout=300)
    return out


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_files_in_another_process(name, monkeypatch, files, tmp_path, elsewhere):
    run(monkeypatch, arguments_of(name, files, tmp_path))
    here, there = contents(tmp_path / name), contents(elsewhere / name)
    assert here.keys() == there.keys() >= {"thresholds.safetensors", "report.json"}
    for file in here:
        assert here[file] == there[file], file


def test_a_run_again_replaces_its_own_files_by_the_same_and_leaves_others(monkeypatch, files, tmp_path):
    arguments = arguments_of("magnitude", files, tmp_path)
    run(monkeypatch, arguments)
    first = contents(tmp_path / "magnitude")
    (tmp_path / "magnitude" / "notes.txt").write_text("mine")
    run(monkeypatch, arguments)
    assert contents(tmp_path / "magnitude") == first | {"notes.txt": b"mine"}
