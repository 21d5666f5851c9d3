"""Files are written whole or not at all."""

import os
import stat
from pathlib import Path

import pytest

from actsparse.errors import OutputError
from actsparse.files import prepare_folder, write_bytes


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
