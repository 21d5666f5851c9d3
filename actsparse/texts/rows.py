"""Files and datasets whose rows have their text in a column."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from actsparse.errors import SourceError, shorten_message

# A row's text is in the first of these columns that it has.
COLUMNS = ("page", "text", "content")


def read_jsonl(content: str, name: str) -> list[str]:
    """
    Read the rows of a JSON Lines file.

    :param name: The file's name, for messages.
    :raises SourceError: If a line is no JSON object with a text column.
    """
    rows: list[str] = []
    for where, row in read_objects(content, name, COLUMNS):
        column = find_column(list(row), where)
        rows.append(_check_cell(row[column], column, where))
    return rows


def read_objects(content: str, name: str, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Read the objects of a JSON Lines file.

    :param name: The file's name, for messages.
    :param fields: What an object should have one of, for messages.
    :return: Where each stands, and the object.
    :raises SourceError: If a line is no JSON object.
    """
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            msg = f"{where} is not JSON: {shorten_message(error)}"
            raise SourceError(msg) from error
        if not isinstance(row, dict):
            msg = f"{where} is not a JSON object with one of {', '.join(fields)}"
            raise SourceError(msg)
        yield where, row


def read_parquet(path: Path) -> list[str]:
    """
    Read the rows of a Parquet file.

    :raises SourceError: If it is no Parquet file with a text column, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        msg = "reading .parquet needs pyarrow: pip install 'actsparse[hub]'"
        raise SourceError(msg) from error
    try:
        with pq.ParquetFile(path) as file:
            column = find_column(file.schema_arrow.names, path.name)
            cells = file.read(columns=[column]).column(column).to_pylist()
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        msg = f"{path.name} is not a readable Parquet file: {shorten_message(error)}"
        raise SourceError(msg) from error
    return [_check_cell(cell, column, f"row {number} of {path.name}") for number, cell in enumerate(cells, start=1)]


def find_column(names: list[str], where: str) -> str:
    """
    Find the column that holds the text.

    :param where: What has them, for the message.
    :raises SourceError: If none of the columns is known to hold text.
    """
    for column in COLUMNS:
        if column in names:
            return column
    found = ", ".join(names[:8]) or "no column"
    msg = f"{where} has none of the columns {', '.join(COLUMNS)}; it has {found}"
    raise SourceError(msg)


def _check_cell(cell: object, column: str, where: str) -> str:
    if isinstance(cell, str):
        return cell
    msg = f"{column!r} in {where} is of type {type(cell).__name__}; it must be text"
    raise SourceError(msg)
