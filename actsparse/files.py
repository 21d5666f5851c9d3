"""Writing results: whole or not at all."""

import os
import tempfile
from pathlib import Path

from actsparse.distributed import is_first
from actsparse.errors import OutputError


def write_bytes(path: Path, data: bytes) -> None:
    """
    Write a file so that nobody ever sees it half-written; of several processes that work together, the first does.

    :param path: The file; replaced if it exists.
    :param data: What it shall hold.
    :raises OutputError: If it cannot be written; what was there before is then still there.
    """
    if not is_first():
        return
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise OutputError(msg) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def prepare_folder(path: Path) -> Path:
    """
    Make an output folder and make sure that it can be written, before any work is spent on its contents.

    :param path: The folder; its parents are made too.
    :return: The folder.
    :raises OutputError: If it is a file or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError:
        msg = f"the output folder {path} is a file"
        raise OutputError(msg) from None
    except OSError as error:
        msg = f"cannot write to the output folder {path}: {error.strerror or error}"
        raise OutputError(msg) from None
    return path
