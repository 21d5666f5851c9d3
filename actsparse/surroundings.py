"""What a process may lack around it: a home folder, an output that takes any character, room behind that output."""

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def stand_in_for_home() -> None:
    """
    Where no home folder is known, name one that nothing can be written to.

    OpenVINO cannot be imported without one. What wants to write there, such as the cache, says what else to set.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = os.devnull


def accept_any_text() -> None:
    """Let standard output show a question mark for a character that its encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def require_encodable(arguments: Iterable[str]) -> None:
    """
    Check that file names mean the same to Python and to the libraries, which take all of them for UTF-8.

    :param arguments: The command line.
    :raises ActsparseError: If one has characters beyond ASCII where Python does not use UTF-8.
    """
    encoding = sys.getfilesystemencoding()
    other = next((argument for argument in arguments if not argument.isascii()), None)
    if other is not None and encoding != "utf-8":
        from actsparse.errors import ActsparseError  # which takes a home folder to be imported

        msg = f"{other!r} cannot be used in a locale of encoding {encoding}: set PYTHONUTF8=1, or a UTF-8 locale"
        raise ActsparseError(msg)


@contextmanager
def explain_output_errors() -> Iterator[None]:
    """
    Print on standard output, to its end.

    :raises OutputError: If it cannot be written, as where it goes to a file on a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Python would try once more as it ends, and fail with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        from actsparse.errors import OutputError  # as above

        msg = f"cannot write to standard output: {error.strerror or error}"
        raise OutputError(msg) from None
