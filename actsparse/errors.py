"""The mistakes a caller can make, each one line of text; the command line prints them without a traceback."""

import difflib
import textwrap
from collections.abc import Callable, Iterable

import nncf


class ActsparseError(ValueError):
    """Something the caller gave cannot be used; nothing was changed."""


class ScopeError(ActsparseError, nncf.ValidationError):
    """A scope matches nothing, too much, or asks for an impossible sparsity."""


class DatasetError(ActsparseError):
    """The calibration data is empty, does not fit the model, or makes it produce NaN or infinity."""


class ThresholdsError(ActsparseError):
    """A thresholds file cannot be read, or belongs to another model."""


class SourceError(ActsparseError):
    """A text source or a model cannot be found or read."""


class MemoryLimitError(SourceError):
    """A model does not fit into the memory that it may take; its files are in order."""


class OutputError(ActsparseError):
    """A result cannot be written where it was asked for."""


def nearest(
    name: str, candidates: Iterable[str], limit: int = 3, judged_by: Callable[[str], str] = lambda candidate: candidate
) -> str:
    """
    List the candidates most similar to a name, for an error message.

    :param name: What the caller wrote.
    :param candidates: What would have been accepted.
    :param limit: How many to list at most.
    :param judged_by: What of a candidate is compared with the name; of those that are alike in it, the first is listed.
    :return: The nearest candidates joined by commas; all-unlike names fall back to the first ones.
    """
    pool: dict[str, str] = {}
    for candidate in candidates:
        pool.setdefault(judged_by(candidate), candidate)
    close = difflib.get_close_matches(name, pool, n=limit, cutoff=0.4) or list(pool)[:limit]
    return ", ".join(pool[part] for part in close) or "none"


def shorten_message(error: BaseException, limit: int = 240) -> str:
    """
    Make one short line of what a library's error says, for an error message.

    :param error: The error.
    :param limit: Number of characters to keep.
    :return: The start of its message, or its type where it has none.
    """
    return textwrap.shorten(str(error), width=limit, placeholder=" …") or type(error).__name__


def one_line(error: BaseException) -> str:
    """
    Make one short line of an error that nobody foresaw.

    :param error: The error.
    :return: Its type and the start of its message.
    """
    return f"{type(error).__name__}: {shorten_message(error)}"
