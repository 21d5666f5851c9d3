"""The exit codes of every command, for scripts to rely on."""

from enum import IntEnum


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
