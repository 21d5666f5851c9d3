"""What a launcher such as torchrun tells the processes that it starts."""

import os
import signal
from types import FrameType

from actsparse.exit_codes import ExitCode


def is_launched() -> bool:
    """
    Tell whether a launcher has started this process as one of several.

    :return: Whether the environment says so.
    """
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


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


_PROCESS = f"process {launched_rank()}"
