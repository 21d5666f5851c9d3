"""The progress bar of everything that takes long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from actsparse.distributed import is_first


@contextmanager
def progress_bar(
    description: str, *, total: int | None = None, unit: str = "", is_wanted: bool = True
) -> Iterator[Callable[[int], None]]:
    """
    Show on stderr how far something has come; the bar is gone afterwards.

    :param description: What is being done.
    :param total: How many steps there are, where it is known.
    :param unit: What a step is, in the plural.
    :param is_wanted: Whether to show it; it is never shown where stderr is not a terminal.
    :return: A context with the function to call with the number of steps just done.
    """
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (is_wanted and console.is_terminal and is_first()),
    )
    with progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
