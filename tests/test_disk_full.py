"""A disk that is full, or takes no longer files: one line says so, and what was there before still is."""

import errno
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch

from actsparse import cli, save_thresholds, sparsify_activations
from actsparse.console.plot import plot_sparsity_by_layer
from actsparse.console.report import write_json
from actsparse.errors import OutputError, SourceError
from actsparse.evaluation.sparsity import measure_sparsity
from actsparse.models import default
from actsparse.models.save import save_folder
from actsparse.openvino import export_model
from actsparse.recovery.checkpoint import Checkpoint, write_checkpoint
from actsparse.storage import assets

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    # Lazily: a library may still have a file mapped.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, room: int) -> None:
    """Fill a disk but for so many bytes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.truncate(filler, filler.stat().st_size - room)


@contextmanager
def short_files(size: int) -> Iterator[None]:
    """Let no file of this process become longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    """Read a folder; unfinished and other left-over files would show."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "filler"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@dataclass(frozen=True)
class Outputs:
    """Everything that can be written, from a tiny language model."""

    model: Any
    tokenizer: Any
    batches: Any
    wheel: Path

    def thresholds(self, folder: Path) -> None:
        save_thresholds(self.model, folder / "x.safetensors", padding="x" * 50_000)

    def report(self, folder: Path) -> None:
        write_json(folder / "report.json", {"x": "x" * 50_000})

    def plot(self, folder: Path) -> None:
        plot_sparsity_by_layer({"x": measure_sparsity(self.model, self.batches[:1])}, folder / "x.png")

    def checkpoint(self, folder: Path) -> None:
        write_checkpoint(folder / "x.checkpoint", Checkpoint(1, [], {"trained/x": torch.ones(20_000)}), "run")

    def model_folder(self, folder: Path) -> None:
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if "sparsifier" not in name}
        save_folder(self.model, self.tokenizer, folder, weights=weights)

    def openvino_folder(self, folder: Path) -> None:
        export_model(self.model, folder, self.tokenizer)

    def conversion(self, _folder: Path) -> None:
        default._keep_conversion(self.model, self.tokenizer, assets.cache_dir() / "default")

    def openvino_in_the_cache(self, _folder: Path) -> None:
        parameter = ov.opset13.parameter([1, 100], ov.Type.f32)
        constant = ov.opset13.constant(torch.rand(100, 200).numpy())
        product = ov.opset13.matmul(parameter, constant, False, False)
        model = ov.Model([product], [parameter], "product")  # pyright: ignore[reportGeneralTypeIssues]
        with assets.partial_folder() as partial:
            ov.save_model(model, partial / "x.xml", compress_to_fp16=False)

    def asset(self, _folder: Path) -> None:
        with zipfile.ZipFile(self.wheel) as archive:
            data = archive.read("x/x")
        member = assets.Member("x/x", len(data), assets.hashlib.sha256(data).hexdigest())
        package = assets.Package("x", "1", "x", self.wheel.stat().st_size, assets.file_sha256(self.wheel), (member,))
        assets.fetch_member(package, member)


WRITERS = [name for name in vars(Outputs) if not name.startswith("_") and name not in Outputs.__annotations__]
IN_THE_CACHE = ("conversion", "openvino_in_the_cache", "asset")


@pytest.fixture
def outputs(small_language_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    model, tokenizer, _, batches = small_language_model
    sparsify_activations(model, batches, 0.5)
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x/x", os.urandom(50_000))

    def copy_wheel(_package: assets.Package, folder: Path) -> Path:
        (folder / "x.whl").write_bytes(wheel.read_bytes())
        return folder / "x.whl"

    monkeypatch.setattr(assets, "download_wheel", copy_wheel)
    return Outputs(model, tokenizer, batches, wheel)


def write_and_fail(write: Callable[[Path], None], name: str, folder: Path, reason: str) -> None:
    expected = SourceError if name in IN_THE_CACHE else OutputError
    with pytest.raises(expected, match=reason) as caught:
        write(folder)
    assert "\n" not in str(caught.value)


# Exporting takes seconds: once, and far enough to fail in the middle.
@pytest.mark.parametrize(
    ("name", "room"), [(name, room) for name in WRITERS for room in (0, 2**15) if room or name != "openvino_folder"]
)
def test_a_full_disk_is_told_and_leaves_what_was_there(
    outputs: Outputs, disk: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: int
) -> None:
    monkeypatch.setenv("ACTSPARSE_CACHE", str(disk))
    write = getattr(outputs, name)
    if name not in IN_THE_CACHE:
        write(disk)
    before = contents(disk)
    fill(disk, room)
    write_and_fail(write, name, disk, "No space left on device|is the disk full")
    assert contents(disk) == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_grow_is_told_and_leaves_what_was_there(
    outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setenv("ACTSPARSE_CACHE", str(folder))
    write = getattr(outputs, name)
    if name not in IN_THE_CACHE:
        write(folder)
    before = contents(folder)
    with short_files(1000):
        write_and_fail(write, name, folder, "File too large|is the disk full")
    assert contents(folder) == before


COMMANDS = {
    "sparsify": ("sparsify", "{model}", "--sparsity", "0.5", "--batches", "2", "--algorithm", "magnitude"),
    "sweep": ("sweep", "{model}", "--sparsity", "0.5", "--algorithms", "magnitude", "--batches", "2")
    + ("--text", "{text}", "--max-length", "64"),
    "demo": ("demo", "--model", "{model}", "--batches", "2", "--text", "{text}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk_ends_with_one_line_and_exit_code_2(
    files: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_cache: Path,
    name: str,
) -> None:
    values = {"model": str(files / "model"), "text": str(files / "evaluation.txt")}
    command = [word.format(**values) for word in COMMANDS[name]]
    arguments = [*command, "--out", str(disk), "--calibration", str(files / "calibration.txt")]

    def run() -> int:
        monkeypatch.setattr(sys, "argv", ["actsparse", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    assert run() == 0
    before = contents(disk)
    for point in disk.glob("points/*"):  # else nothing is left to measure
        point.unlink()
        before.pop(str(point.relative_to(disk)))
    fill(disk, 0)
    capsys.readouterr()
    assert run() == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("error: cannot write ")
    assert "No space left on device" in last
    assert "Traceback" not in captured.err
    assert contents(disk) == before
