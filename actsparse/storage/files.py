"""Looking at paths that a user gave, and writing results: whole or not at all."""

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from actsparse.errors import ActsparseError, OutputError, SourceError
from actsparse.runtime.distributed import is_first

UNFINISHED = ".actsparse-unfinished-"
"""What the names of files and folders begin with until they are whole; nothing reads from them."""
# All that OpenVINO says of a file that it cannot write.
_STREAM_ERROR = "iostream error"


def kind_of(path: Path, error: type[ActsparseError] = SourceError) -> Literal["file", "folder", "other"] | None:
    """
    Tell what lies at a path that a user gave.

    Where the system refuses to look, `Path.is_file` and its like raise before Python 3.14, and say that nothing is
    there since.

    :return: What is there, links followed; `other` for a device or a pipe, None for nothing.
    :raises ActsparseError: If that cannot be told, such as in another user's folder or for a name that is too long.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: what can be no name of a file
        return None
    except OSError as refusal:
        msg = f"cannot reach {path}: {refusal.strerror or refusal}"
        raise error(msg) from None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def written_since(folder: Path, moment: float) -> list[str]:
    """
    List what has been written into a folder, which may hold the user's own files too.

    :param moment: Since when, as `time.time` says it.
    :return: The names, sorted; without unfinished files and those that have gone meanwhile.
    """
    names = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if not path.name.startswith(UNFINISHED) and path.lstat().st_mtime >= moment:
                names.append(path.name)
    return sorted(names)


def write_bytes(path: Path, data: bytes) -> None:
    """
    Write a file so that nobody ever sees it half-written; of several processes that work together, the first does.

    :raises OutputError: If it cannot be written; what was there before is then still there.
    """
    if not is_first():
        return
    try:
        with _unfinished(lambda: _make_file(path.parent)) as temporary:
            temporary.write_bytes(data)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise OutputError(msg) from None


@contextmanager
def unfinished_folder(parent: Path) -> Iterator[Path]:
    """
    Lend a new folder for unfinished work, and remove it afterwards, whatever happens.

    What is finished is moved out of it with `publish` or one rename. Where the process is killed instead, the next one
    that writes into the parent folder removes it.

    :param parent: The folder, on whose file system the new one shall be.
    """
    with _unfinished(lambda: Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=parent))) as folder:
        yield folder


def publish(files: Iterable[Path], folder: Path, *, last: str) -> None:
    """
    Move finished files that belong together to their place, replacing those that are there.

    Moved, not written: whoever has mapped an earlier file keeps it. Wherever this is cut short, if only by a power cut,
    the folder has no file `last`, so that nobody takes new and old ones for one whole.

    :param last: The name of the one without which the others mean nothing.
    """
    files = list(files)
    for file in files:
        sync(file)
    (folder / last).unlink(missing_ok=True)
    sync(folder)
    for file in sorted(files, key=lambda file: file.name == last):
        if file.name == last:
            sync(folder)
        file.replace(folder / file.name)
    sync(folder)


def sync(path: Path) -> None:
    """
    Have what was written on the disk before anything that is written later.

    Without it a file that was renamed may be there, and empty, after a power cut.

    :param path: A file, or a folder: the names in it.
    :raises OSError: If the disk does not take it.
    """
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prepare_folder(path: Path) -> Path:
    """
    Make an output folder and make sure that it can be written, before any work is spent on its contents.

    :raises OutputError: If it is a file or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        msg = f"the output folder {path} is a file"
        raise OutputError(msg) from None
    except OSError as error:
        msg = f"cannot write to the output folder {path}: {error.strerror or error}"
        raise OutputError(msg) from None
    return path


@contextmanager
def as_os_error() -> Iterator[None]:
    """
    Turn the errors of libraries that write files themselves into OSErrors.

    :raises OSError: In place of safetensors', tokenizers' and OpenVINO's own errors.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if _STREAM_ERROR not in str(error):
            raise
        msg = "OpenVINO could not write all of a model; is the disk full?"
        raise OSError(msg) from error
    except Exception as error:
        # tokenizers raises nothing more special.
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def _make_file(folder: Path) -> Path:
    # Not by tempfile, which lets nobody else read it: the system gives it the permissions of any new file.
    path = folder / f"{UNFINISHED}{secrets.token_hex(8)}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666))
    return path


@contextmanager
def _unfinished(make: Callable[[], Path]) -> Iterator[Path]:
    """Hold a file or folder locked while it is made: one that is not locked is known to have no maker any more."""
    path, handle = _make_locked(make)
    try:
        _remove_abandoned(path.parent)
        yield path
    finally:
        _remove(path)
        os.close(handle)


def _make_locked(make: Callable[[], Path]) -> tuple[Path, int]:
    while True:
        path = make()
        with contextlib.suppress(FileNotFoundError):  # taken for abandoned before it was locked
            handle = os.open(path, os.O_RDONLY)
            _lock(handle, is_waiting=True)
            if path.exists():
                return path, handle
            os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # gone, or another user's
            handle = os.open(path, os.O_RDONLY)
            try:
                if _lock(handle, is_waiting=False):
                    _remove(path)
            finally:
                os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(handle: int, *, is_waiting: bool) -> bool:
    """Say whether the lock was got; where nothing can be locked, it never is, and nothing counts as abandoned."""
    try:
        import fcntl  # which not every system has

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
    except (ImportError, OSError):
        return False
    return True
