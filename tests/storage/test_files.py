"""Files are written whole or not at all."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actsparse.errors import ActsparseError, OutputError, SourceError, ThresholdsError
from actsparse.storage.files import (
    UNFINISHED,
    kind_of,
    prepare_folder,
    publish,
    unfinished_folder,
    write_bytes,
    written_since,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_lies_at_a_path_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    kinds = {name: kind_of(tmp_path / name) for name in ("file", "link", ".", "dangling", "none", "file/x", "a\0b")}
    assert kinds == {"file": "file", "link": "file", ".": "folder"} | dict.fromkeys(
        ("dangling", "none", "file/x", "a\0b")
    )
    assert kind_of(Path(os.devnull)) == "other"


@pytest.mark.parametrize("error", [SourceError, OutputError, ThresholdsError])
def test_a_path_that_cannot_be_looked_at_is_one_line(error: type[ActsparseError], tmp_path: Path) -> None:
    with pytest.raises(error, match="cannot reach .*: File name too long") as caught:
        kind_of(tmp_path / ("x" * 300), error)
    assert "\n" not in str(caught.value)


def test_what_has_been_written_since_is_listed(tmp_path: Path) -> None:
    for name in ("mine", "b", "a", f"{UNFINISHED}x"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "mine", (1, 1))
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    os.utime(tmp_path / "latest", (1, 1), follow_symlinks=False)
    assert written_since(tmp_path, 2) == ["a", "b"]


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for data in (b"first", b"second", b""):
        write_bytes(path, data)
        assert path.read_bytes() == data
        assert listing(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_file_has_the_permissions_that_any_new_file_has(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "x", b"data")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~mask


def test_the_files_of_other_threads_keep_their_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    for name in ("open", "umask", "replace"):
        monkeypatch.setattr(os, name, after(getattr(os, name), lambda: modes.append(mode_of_a_new_file(tmp_path))))
    before = os.umask(0o077)
    modes.clear()
    try:
        write_bytes(tmp_path / "x", b"data")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert modes
    assert set(modes) == {0o600}


def after(function: Callable[..., Any], do: Callable[[], object]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        do()
        return result

    return run


def mode_of_a_new_file(folder: Path) -> int:
    """Make a file in another thread, and say what its permissions are."""
    path = folder / "other"

    def make() -> None:
        with path.open("wb"):
            pass

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    path = tmp_path / "x.bin"
    write_bytes(path, b"old")
    # Path.replace and os.replace end in the same place.
    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["x.bin"]


def test_a_file_in_no_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*missing.*: No such file or directory") as caught:
        write_bytes(tmp_path / "missing" / "x", b"data")
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_files_place_stays(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_bytes(tmp_path / "x", b"data")
    assert listing(tmp_path) == ["x"]


def test_a_folder_is_made_with_its_parents_and_may_be_there(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert prepare_folder(folder) == folder
    (folder / "x").touch()
    assert prepare_folder(folder) == folder
    assert listing(folder) == ["x"]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(OutputError, match="the output folder .* is a file"):
        prepare_folder(tmp_path / "x")
    with pytest.raises(OutputError, match="cannot write to the output folder"):
        prepare_folder(tmp_path / "x" / "y")


# ---- What killed processes leave

HOLD = """
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from actsparse.storage.files import unfinished_folder
with unfinished_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"half")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_process_is_at_work_on_stays_and_what_it_leaves_when_killed_goes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        half = Path(process.stdout.readline().strip()) / "half"
        prepare_folder(tmp_path)
        write_bytes(tmp_path / "x", b"data")
        assert half.read_bytes() == b"half"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
    assert half.exists()
    write_bytes(tmp_path / "x", b"data")
    assert listing(tmp_path) == ["x"]


@pytest.mark.parametrize("remove", [prepare_folder, lambda folder: write_bytes(folder / "x", b"data")])
def test_abandoned_files_and_folders_go_and_all_others_stay(tmp_path: Path, remove: object) -> None:
    (tmp_path / f"{UNFINISHED}file").write_bytes(b"half")
    (tmp_path / f"{UNFINISHED}folder").mkdir()
    (tmp_path / f"{UNFINISHED}folder" / "half").write_bytes(b"half")
    for name in (".x.abc", "x", ".actsparse", "unfinished"):
        (tmp_path / name).write_bytes(b"mine")
    remove(tmp_path)  # pyright: ignore[reportCallIssue]
    assert listing(tmp_path) == sorted([".x.abc", "x", ".actsparse", "unfinished"])


def test_an_unfinished_folder_is_gone_afterwards_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), unfinished_folder(tmp_path) as folder:
        (folder / "half").write_bytes(b"half")
        raise KeyboardInterrupt
    assert listing(tmp_path) == []


def test_files_that_belong_together_are_never_old_and_new_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    names = ("a", "last", "z")
    for name in names:
        (tmp_path / name).write_bytes(b"old")
        (new / name).write_bytes(b"new")
    seen = []
    replace = Path.replace

    def watch(path: Path, target: Path) -> Path:
        replace(path, target)
        seen.append({name: (tmp_path / name).read_bytes() for name in names if (tmp_path / name).exists()})
        return target

    monkeypatch.setattr(Path, "replace", watch)
    publish([new / name for name in names], tmp_path, last="last")
    assert [set(files) for files in seen] == [{"a", "z"}, {"a", "z"}, {"a", "last", "z"}]
    assert set(seen[-1].values()) == {b"new"}


class Disk:
    """What a power cut leaves: of files what was synced, of folders the names that were there when it was synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.contents: dict[int, bytes] = {}
        self.names: dict[str, int] = {}
        fsync = os.fsync

        def watch(handle: int) -> None:
            fsync(handle)
            state = os.fstat(handle)
            if stat.S_ISDIR(state.st_mode):
                assert state.st_ino == folder.stat().st_ino
                self.names = {path.name: path.stat().st_ino for path in folder.iterdir() if path.is_file()}
            else:
                self.contents[state.st_ino] = os.pread(handle, state.st_size, 0)

        monkeypatch.setattr(os, "fsync", watch)

    def after_a_cut(self) -> dict[str, bytes]:
        """Any name may be on the disk sooner than the folder is synced; contents may not."""
        now = {path.name: path.stat().st_ino for path in self.folder.iterdir() if path.is_file()}
        assert set(now.values()) <= self.contents.keys()
        return {name: self.contents[number] for name, number in self.names.items() if number in self.contents}


def test_a_file_that_was_written_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path)
    for data in (b"first", b"second"):
        write_bytes(tmp_path / "x", data)
        assert disk.after_a_cut() == {"x": data}


def test_files_that_belong_together_survive_a_power_cut_and_old_ones_are_gone_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    disk = Disk(monkeypatch, tmp_path)
    for name in ("a", "last", "z"):
        write_bytes(tmp_path / name, b"old")
        (tmp_path / "new" / name).write_bytes(b"new")
    replace, steps = Path.replace, []

    def watch(path: Path, target: Path) -> Path:
        # What is on the disk before the next name changes.
        steps.append(disk.after_a_cut())
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watch)
    publish([tmp_path / "new" / name for name in ("last", "a", "z")], tmp_path, last="last")
    assert steps[0] == {"a": b"old", "z": b"old"}
    assert steps[-1] == {"a": b"new", "z": b"new"}
    assert disk.after_a_cut() == {"a": b"new", "last": b"new", "z": b"new"}


def test_a_disk_that_does_not_take_a_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    write_bytes(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"cannot write .*x: Input/output error$"):
        write_bytes(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert listing(tmp_path) == ["x"]
