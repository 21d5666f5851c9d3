"""Commands under torchrun: one process speaks and writes, and a killed one leaves nothing half-written behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from actsparse import cli
from actsparse.errors import OutputError
from actsparse.storage.disk_cache import DiskCache
from actsparse.thresholds import read_thresholds

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "actsparse"]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return start_job([*TORCHRUN, *map(str, arguments)])


def start_job(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sparsify(files: Path, out: Path, *options: str | Path) -> list[str | Path]:
    texts = ["--calibration", files / "calibration.txt", "--batches", "4", "--text", files / "evaluation.txt"]
    return ["sparsify", files / "model", "--out", out, "--sparsity", "0.5", *texts, "--max-length", "64", *options]


def run_alone(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["actsparse", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def require_equal_thresholds(one: Path, two: Path) -> None:
    here, there = (read_thresholds(folder / "thresholds.safetensors").thresholds for folder in (one, two))
    assert here.keys() == there.keys()
    for name, threshold in here.items():
        torch.testing.assert_close(there[name], threshold, rtol=1e-6, atol=0)


def test_one_process_speaks_and_writes(files, tmp_path, monkeypatch):
    process = start(*sparsify(files, tmp_path / "two"), "--json", "-")
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    figures = json.loads(output)
    assert figures["processes"] == 2
    assert errors.count("loading ") == 1
    assert run_alone(monkeypatch, *sparsify(files, tmp_path / "one"), "--quiet") == 0
    require_equal_thresholds(tmp_path / "one", tmp_path / "two")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}


def figures_named(value: Any, ending: str) -> list[float]:
    if isinstance(value, dict):
        here = [item for key, item in value.items() if key.endswith(ending) and isinstance(item, float)]
        return here + [figure for item in value.values() for figure in figures_named(item, ending)]
    return [figure for item in value for figure in figures_named(item, ending)] if isinstance(value, list) else []


def command_lines(files: Path, out: Path) -> dict[str, list[str]]:
    """The commands that share their work, each with its figures in a file of its name."""
    text = ["--text", files / "evaluation.txt"]
    calibration = ["--calibration", files / "calibration.txt", "--batches", "4"]
    lines = {
        "evaluate": [files / "model", *text, "--max-length", "64"],
        "sweep": [files / "model", "--algorithms", "magnitude", "--sparsity", "0.5", *text, *calibration],
        "demo": ["--model", files / "model", *text, *calibration],
    }
    return {
        name: [name, *map(str, line), *([] if name == "evaluate" else ["--out", str(out / name)])]
        + ["--quiet", "--json", str(out / f"{name}.json")]
        for name, line in lines.items()
    }


# One job runs them all: most of its time goes into the start.
JOB = """
import json, sys
import torch.distributed as dist
from actsparse import cli
dist.init_process_group("gloo")
for line in json.loads(sys.argv[1]):
    sys.argv = ["actsparse", *line]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, line
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def shared(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "job.py").write_text(JOB)
    lines = list(command_lines(files, folder).values())
    process = start_job([*TORCHRUN[:-2], str(folder / "job.py"), json.dumps(lines)])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("command", ["evaluate", "sweep", "demo"])
def test_what_shares_its_work_finds_what_one_process_does(command, files, tmp_path, monkeypatch, shared):
    # Several processes do not time it.
    monkeypatch.setattr("actsparse.commands.demo._time_decoding", lambda *_: "not here")
    assert run_alone(monkeypatch, *command_lines(files, tmp_path)[command]) == 0
    one, two = (json.loads((folder / f"{command}.json").read_text()) for folder in (tmp_path, shared))
    for ending in ("perplexity", "sparsity"):
        expected = figures_named(one, ending)
        assert expected or (command, ending) == ("evaluate", "sparsity")
        assert figures_named(two, ending) == pytest.approx(expected, rel=1e-6)


def test_a_killed_process_is_told_and_a_rerun_succeeds(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    process = start(*sparsify(files, out))
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 120
    # Killed as soon as something was measured.
    while not list(out.glob("calibration.unfinished/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children() if "actsparse" in child.cmdline()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: process " in errors, errors
    assert "another process of this job has stopped" in errors or "ended by the launcher" in errors
    assert {path.name for path in out.iterdir()} <= {"calibration.unfinished"}
    again = start(*sparsify(files, out))
    _, errors = again.communicate(timeout=180)
    assert again.returncode == 0, errors
    assert {path.name for path in out.iterdir()} == {
        "thresholds.safetensors", "report.json", "report.md", "sparsity_by_layer.png"
    }  # fmt: skip
    assert run_alone(monkeypatch, *sparsify(files, tmp_path / "one"), "--quiet") == 0
    require_equal_thresholds(tmp_path / "one", out)


def test_a_gate_that_fails_is_told_once_and_by_all(files, tmp_path):
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    options = ("--sparsity", "0.8", "--algorithm", "magnitude", "--fail-above", "0", "--json", figures)
    process = start(*sparsify(files, out), *options)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 1
    assert errors.count("failed: token perplexity") == 1
    assert json.loads(figures.read_text())["gate"]["has_passed"] is False
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "sparsity_by_layer.png"}


def test_what_is_for_one_process_says_so(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_alone(monkeypatch, "doctor") == 2
    assert "process 1: actsparse doctor works in one process" in capsys.readouterr().err


def note_measured(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Note from now on what is measured anew instead of being found."""
    measured: list[object] = []
    find = DiskCache._find

    def note(self: DiskCache, what: str, measure):
        return find(self, what, lambda: (measured.append(what), measure())[1])

    monkeypatch.setattr(DiskCache, "_find", note)
    return measured


def test_an_interrupted_calibration_goes_on(files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run_alone(monkeypatch, *sparsify(files, tmp_path / "undisturbed"), "--quiet") == 0
    asked: list[object] = []
    find = DiskCache._find

    def stop_at_the_third(self: DiskCache, what: str, measure):
        asked.append(what)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return find(self, what, measure)

    with monkeypatch.context() as patch:
        patch.setattr(DiskCache, "_find", stop_at_the_third)
        assert run_alone(monkeypatch, *sparsify(files, out), "--quiet") == 130
    assert len(list((out / "calibration.unfinished").iterdir())) == 2
    measured = note_measured(monkeypatch)
    assert run_alone(monkeypatch, *sparsify(files, out), "--quiet") == 0
    assert not {repr(what) for what in asked[:2]} & {repr(what) for what in measured}
    assert measured
    whole, resumed = ((folder / "thresholds.safetensors").read_bytes() for folder in (tmp_path / "undisturbed", out))
    assert whole == resumed
    assert not (out / "calibration.unfinished").exists()


def test_a_conversion_that_fails_costs_no_calibration(files, tmp_path, monkeypatch, capsys):
    def fail(*_: object, **__: object) -> None:
        msg = "no conversion today"
        raise OutputError(msg)

    out = tmp_path / "out"
    monkeypatch.setattr("actsparse.openvino.deploy_model", fail)
    assert run_alone(monkeypatch, *sparsify(files, out), "--accelerate", "--quiet") == 2
    assert "no conversion today" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"calibration.unfinished"}
    measured = note_measured(monkeypatch)
    assert run_alone(monkeypatch, *sparsify(files, out), "--quiet") == 0
    assert not measured
    assert not (out / "calibration.unfinished").exists()


@pytest.mark.parametrize("damage", ["other settings", "half a file", "not a file"])
def test_measurements_of_another_calibration_are_not_taken(damage, tmp_path):
    found = {"a": torch.arange(3.0), "b": torch.ones(())}
    calls: list[int] = []

    def measure() -> dict[str, torch.Tensor]:
        calls.append(1)
        return found

    DiskCache(tmp_path, lambda: "one").get_or_measure("x", measure)
    path = next(tmp_path.iterdir())
    if damage == "half a file":
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "not a file":
        path.unlink()
        path.mkdir()
    again = DiskCache(tmp_path, lambda: "other" if damage == "other settings" else "one")
    if damage == "not a file":
        with pytest.raises(OutputError):
            again.get_or_measure("x", measure)
        return
    assert again.get_or_measure("x", measure)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 2


def test_kept_measurements_come_back_as_they_were(tmp_path):
    from actsparse.algorithms import Attribution, GradientSums
    from actsparse.algorithms.statistics import MagnitudeSketch

    gradients = GradientSums(3)
    gradients.add(torch.randn(5, 3), torch.randn(5, 3))
    sketch = MagnitudeSketch.of(torch.randn(50))
    kinds = {
        "tensor": {"a": torch.randn(2), "b": torch.ones(())},
        "sketch": {"a": sketch},
        "gradients": {"a": gradients},
        "attribution": {"z": Attribution((1.5, -2.0), 0.1), "a": Attribution((0.0, 1e300), 3.0)},
        "number": {"a": 0.1},
        "numbers": {"a": (0.1, -0.2)},
        "text": "a layer",
        "nothing": {},
    }
    kept = DiskCache(tmp_path, lambda: "one")
    for kind, found in kinds.items():
        kept.get_or_measure(kind, lambda found=found: found)
    again = DiskCache(tmp_path, lambda: "one")
    back = {kind: again.get_or_measure(kind, lambda: pytest.fail("measured again")) for kind in kinds}
    for kind in ("attribution", "number", "numbers", "text", "nothing"):
        assert back[kind] == kinds[kind]
        assert list(back[kind]) == list(kinds[kind])
    assert back["tensor"]["a"].equal(kinds["tensor"]["a"])
    assert back["sketch"]["a"].counts.equal(sketch.counts)
    assert back["gradients"]["a"].tokens == 5
    for ours, theirs in zip(back["gradients"]["a"].vectors, gradients.vectors, strict=True):
        assert ours.equal(theirs)
    kept.forget()
    assert not tmp_path.exists()
