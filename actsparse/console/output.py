"""How commands talk: what happens on standard error, results on standard output or in a JSON file."""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import typer

from actsparse.runtime.process import ExitCode, explain_output_errors, is_launched, launched_rank
from actsparse.runtime.progress import hide_progress

STANDARD_OUTPUT = Path("-")


class Output:
    """
    What one command says.

    Of several processes that a launcher has started, the first one speaks.

    While a command works, standard output is kept free of what libraries print; then it holds the command's tables, or
    its JSON and nothing else.

    :param json: Where every figure goes as JSON: a file, ``-`` for standard output, or None.
    :param is_quiet: Whether to leave out progress bars, status lines and tables. Warnings and errors remain.
    :raises OutputError: If the file cannot be written, before any work is spent on its contents.
    """

    def __init__(self, json: Path | None = None, is_quiet: bool = False) -> None:
        is_first = launched_rank() == 0
        self.json = json if is_first else None
        self.is_quiet = is_quiet or not is_first
        if json is not None:
            _require_writable(json)
        self._working = ExitStack()

    def __enter__(self) -> "Output":
        self._working.enter_context(_libraries_on_standard_error())
        if self.is_quiet:
            self._working.enter_context(hide_progress())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._working.close()

    def say(self, message: str) -> None:
        """Tell what happens."""
        if not self.is_quiet:
            tell(message)

    def finish(self, *results: Any, figures: Mapping[str, Any]) -> None:
        """
        Give out what the command has found.

        :param figures: The same and more as JSON can hold it.
        :raises OutputError: If it cannot be written.
        """
        from actsparse.console.report import print_result, to_json, write_json
        from actsparse.storage.files import prepare_folder

        self._working.close()
        is_on_stdout = self.json == STANDARD_OUTPUT
        stream = sys.stderr if is_on_stdout else sys.stdout
        if not self.is_quiet and stream is not None:  # None where the caller has closed it
            for result in results:
                print_result(result, stream)
        if is_on_stdout:
            with explain_output_errors():
                sys.stdout.write(to_json(figures, is_ascii=True))
        elif self.json is not None:
            prepare_folder(self.json.parent)
            write_json(self.json, figures)

    def fail(self, message: str) -> NoReturn:
        """
        End the command because a check failed, in all processes of a launcher at once.

        :param message: Which one, in a line; printed even where the command is quiet.
        :raises typer.Exit: Always.
        """
        if launched_rank() == 0:
            tell(f"failed: {message}")
        if is_launched():
            from actsparse.runtime.distributed import wait_for_all

            # A launcher ends all processes as soon as one has failed, and the first may still be writing.
            wait_for_all()
        raise typer.Exit(ExitCode.CHECK_FAILED)


def tell(message: str) -> None:
    """Print a line on standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def _libraries_on_standard_error() -> Iterator[None]:
    """Send to standard error what Python code, C++ code and child processes write to standard output."""
    if sys.stdout is None:  # closed by the caller
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if os.name == "posix":  # what C code has printed may still be in its buffer
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _require_writable(path: Path) -> None:
    from actsparse.errors import OutputError
    from actsparse.storage.files import kind_of

    if path == STANDARD_OUTPUT:
        if sys.stdout is None:
            msg = "--json - is for standard output, which is closed"
            raise OutputError(msg)
        return
    if kind_of(path, OutputError) not in ("file", None):
        msg = f"--json {path} is no regular file; give a file, or - for standard output"
        raise OutputError(msg)
    # A relative path ends in ".", which is there even where the working folder has been removed.
    folder = next(parent for parent in path.parents if kind_of(parent, OutputError))
    is_folder = kind_of(folder, OutputError) == "folder"
    if not is_folder or not os.access(folder, os.W_OK):
        msg = f"cannot write {path}: {folder} is {'not writable' if is_folder else 'no folder'}"
        raise OutputError(msg)
