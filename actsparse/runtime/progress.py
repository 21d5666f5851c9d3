"""Progress bars and spinners of everything that takes long."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from actsparse.runtime.process import launched_rank

# Told what happens next, a line at a time.
Say = Callable[[str], None]

# What tqdm and the hub's library read when they are imported.
_SWITCHES = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
_is_hidden = ContextVar("is_hidden", default=False)


@contextmanager
def hide_progress() -> Iterator[None]:
    """Show no progress bars and spinners: neither these, nor those of libraries that are imported from now on."""
    token = _is_hidden.set(True)
    before = {name: os.environ.get(name) for name in _SWITCHES}
    os.environ.update(dict.fromkeys(_SWITCHES, "1"))
    try:
        yield
    finally:
        _is_hidden.reset(token)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def hides_progress() -> bool:
    """
    Tell whether progress is hidden on purpose, for a process to start another one alike.

    :return: Whether this is within `hide_progress`.
    """
    return _is_hidden.get()


def status_console() -> Console:
    """
    Make the console of progress bars and spinners.

    :return: Standard error, or nothing within `hide_progress`.
    """
    return Console(stderr=True, quiet=_is_hidden.get())


def shows_progress() -> bool:
    """
    Tell whether progress is shown.

    :return: Whether standard error is a terminal, this is the first of a launcher's processes, and progress is not
        hidden.
    """
    console = status_console()
    return console.is_terminal and not console.quiet and launched_rank() == 0


@contextmanager
def progress_bar(
    description: str, *, total: int | None = None, unit: str = "", is_wanted: bool = True
) -> Iterator[Callable[[int], None]]:
    """
    Show on stderr how far something has come; the bar is gone afterwards.

    :param total: How many steps there are, where it is known.
    :param unit: What a step is, in the plural.
    :param is_wanted: Whether to show it; it is never shown where stderr is not a terminal.
    :return: A context with the function to call with the number of steps just done.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=status_console(),
        transient=True,
        disable=not (is_wanted and shows_progress()),
    )
    with progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
