"""Questions to ask a model: from CSV, JSON Lines, or the hub."""

import csv
import io
from pathlib import Path
from typing import Any

from actsparse.errors import SourceError, nearest, shorten_message
from actsparse.storage.files import kind_of
from actsparse.texts.files import names_beside, read_text
from actsparse.texts.hub import load_hub_rows
from actsparse.texts.pages import unify_line_ends
from actsparse.texts.rows import read_objects

FIELD = "question"
TRUTHFULQA = "truthfulqa"
SUFFIXES = (".csv", ".jsonl")


def load_questions(source: str | Path, *, number: int | None = None) -> tuple[str, ...]:
    """
    Load questions.

    :param source: A .csv or .jsonl file with a field `question` (in capitals or not), or `truthfulqa` from the hub.
    :param number: How many to take, from the first on; None takes all.
    :raises SourceError: If there is no such source, it cannot be read, or has fewer questions.
    """
    if number is not None and number < 1:
        msg = f"{number} questions cannot be asked; it must be a whole number, at least 1"
        raise SourceError(msg)
    name, path = str(source), Path(source)
    if name == TRUTHFULQA:
        rows = _load_truthfulqa()
    elif path.suffix.lower() not in SUFFIXES:
        msg = f"{name!r} is no source of questions: give a file {' or '.join(SUFFIXES)}, or `{TRUTHFULQA}` (hub)"
        raise SourceError(msg)
    elif kind_of(path) != "file":
        msg = f"there is no file {name!r}; nearest: {nearest(name, names_beside(path, SUFFIXES))}"
        raise SourceError(msg)
    else:
        read = _read_csv if path.suffix.lower() == ".csv" else _read_jsonl
        rows = read(read_text(path), path.name)
    questions = tuple(_find_question(row, f"row {i} of {path.name}") for i, row in enumerate(rows, start=1))
    if len(questions) < (number or 1):
        msg = f"{name} has {len(questions)} questions, not {number or 1}"
        raise SourceError(msg)
    return questions[:number]


def _load_truthfulqa() -> list[dict[str, Any]]:
    try:
        return load_hub_rows("generation", "validation", "truthfulqa/truthful_qa")
    except SourceError as error:
        msg = f"`{TRUTHFULQA}` cannot be had from the hub: {error}; give a .csv or .jsonl file of questions"
        raise SourceError(msg) from None


def _read_csv(text: str, name: str) -> list[dict[str, Any]]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        msg = f"{name} is not a readable CSV file: {shorten_message(error)}"
        raise SourceError(msg) from None


def _read_jsonl(text: str, name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_objects(text, name, (FIELD,))]


def _find_question(row: dict[str, Any], where: str) -> str:
    question = next((row[key] for key in row if isinstance(key, str) and key.strip().lower() == FIELD), None)
    if not isinstance(question, str) or not question.strip():
        msg = f"{where} has no field {FIELD!r} with text in it"
        raise SourceError(msg)
    return unify_line_ends(question).strip()
