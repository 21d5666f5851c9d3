"""Text files of every kind that can be read."""

from collections.abc import Collection
from pathlib import Path

from actsparse.errors import SourceError, nearest, shorten_message
from actsparse.storage.files import kind_of
from actsparse.texts.pages import split_rows, split_text, unify_line_ends
from actsparse.texts.rows import read_jsonl, read_parquet
from actsparse.texts.text import Text

NAMED_SOURCES = ("wikitext", "default", "default-calibration")
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
ROW_SUFFIXES = (".jsonl", ".parquet")


def load_file(source: str) -> Text:
    """
    Load a file.

    :param source: Its path, as the user wrote it.
    :raises SourceError: If there is no such file, or it cannot be read.
    """
    path = Path(source)
    _validate_path(source, path)
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        pages, is_wikitext = split_rows(read_parquet(path))
    elif suffix == ".jsonl":
        pages, is_wikitext = split_rows(read_jsonl(read_text(path), path.name))
    else:
        pages, has_titles = split_text(read_text(path))
        is_wikitext = has_titles or suffix != ".txt"
    return Text(path.name, tuple(pages), is_wikitext)


def read_text(path: Path) -> str:
    """
    Read a UTF-8 file.

    :raises SourceError: If it cannot be read or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        msg = f"{path.name} cannot be read: {error.strerror or shorten_message(error)}"
        raise SourceError(msg) from error
    if b"\0" in data:
        msg = f"{path.name} is a binary file, not text"
        raise SourceError(msg)
    try:
        return unify_line_ends(data.decode())
    except UnicodeDecodeError as error:
        msg = f"{path.name} is not UTF-8 text (at byte {error.start})"
        raise SourceError(msg) from error


def names_beside(path: Path, suffixes: Collection[str]) -> list[str]:
    """
    List files that may have been meant, for an error message.

    :return: Those in its folder, or in the working folder where it has none; none where that cannot be listed.
    """
    try:
        folder = path.parent if path.parent.is_dir() else Path()
        return [str(folder / entry.name) for entry in sorted(folder.iterdir()) if entry.suffix.lower() in suffixes]
    except (OSError, ValueError):
        return []


def _validate_path(source: str, path: Path) -> None:
    """Check that a source is a file of a kind that can be read."""
    suffixes = TEXT_SUFFIXES + ROW_SUFFIXES
    kind = kind_of(path)
    if kind == "folder":
        msg = f"{source!r} is a folder; give a file of it: {nearest(source, names_beside(path / '_', suffixes))}"
    elif kind != "file":
        names = [*NAMED_SOURCES, *names_beside(path, suffixes)]
        msg = f"there is no text source or file {source!r}; nearest: {nearest(source, names)}"
    elif path.suffix.lower() not in suffixes:
        msg = f"{source!r} is not of a kind that can be read: {', '.join(suffixes)}"
    else:
        return
    raise SourceError(msg)
