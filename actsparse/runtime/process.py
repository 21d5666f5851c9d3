"""What a process has around it: a launcher, a home folder, an output that takes any character, exit codes."""

import io
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType


class ExitCode(IntEnum):
    """What a command ends with."""

    DONE = 0
    CHECK_FAILED = 1
    MISTAKE = 2
    UNEXPECTED = 70
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_CODES_HELP = (
    f"Exit codes: {ExitCode.DONE} done; {ExitCode.CHECK_FAILED} a check failed (doctor, regress, --fail-above); "
    f"{ExitCode.MISTAKE} a mistake in what was given, told in one line; {ExitCode.UNEXPECTED} an unexpected error, "
    f"with its traceback; {ExitCode.INTERRUPTED} interrupted; {ExitCode.TERMINATED} ended by a launcher."
)


def is_launched() -> bool:
    """Tell whether a launcher has started this process as one of several."""
    return _number("WORLD_SIZE", 1) > 1


def launched_rank() -> int:
    """
    Tell which of several processes this is.

    :return: Its number, from 0 on; 0 without a launcher.
    """
    return _number("RANK", 0) if is_launched() else 0


def explain_termination() -> None:
    """Say in one line that the launcher has ended this process, as it does where another one has failed."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        # Not sys.exit: a thread of the communication library may hold the process up.
        os.write(2, f"error: {_PROCESS}: ended by the launcher; no file was left half-written\n".encode())
        os._exit(ExitCode.TERMINATED)

    signal.signal(signal.SIGTERM, stop)


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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def require_encodable(arguments: Iterable[str]) -> None:
    """
    Check that file names mean the same to Python and to the libraries, which take all of them for UTF-8.

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


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


_PROCESS = f"process {launched_rank()}"
