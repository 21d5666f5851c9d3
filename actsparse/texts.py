"""Text sources: what a user names on the command line, as pages to evaluate on or batches to calibrate with."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from actsparse.errors import DatasetError, SourceError, nearest
from actsparse.evaluation.wikitext import detokenize, is_heading, split_pages

Purpose = Literal["evaluation", "calibration"]

NAMED_SOURCES = ("wikitext", "default", "default-calibration")
TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
ROW_SUFFIXES = (".jsonl", ".parquet")
# A row's text is in the first of these columns that it has.
COLUMNS = ("page", "text", "content")
# The first holds an article a row; the second, a line a row, serves who has only that one cached.
_HUB_DATASETS = ("EleutherAI/wikitext_document_level", "Salesforce/wikitext")
_HUB_TIMEOUT_S = 5
# The share of the packaged Wikipedia articles, from the file's end, that `default` evaluates on.
_HELD_OUT_SHARE = 0.25
# Two thirds of those are stubs, some only a title, which say little of a model and much of its first guess.
_MIN_WORDS = 100
_ARTICLE_START = re.compile(r'\s*<doc(?:\s+\w+="[^"]*")*\s*>')
_ARTICLE_END = "</doc>"


@dataclass(frozen=True)
class Text:
    """Pages of text and where they come from."""

    name: str
    """What reports call it."""
    pages: tuple[str, ...]
    """As the source has them: WikiText pages are not detokenised, as words are counted on the original."""
    is_wikitext: bool = False
    """Whether the pages are tokenised as WikiText is, with ` @-@ ` for hyphens."""

    @property
    def sha256(self) -> str:
        """Hash of the pages, each followed by a zero byte: equal for equal pages, whatever file they come from."""
        digest = hashlib.sha256()
        for page in self.pages:
            digest.update(page.encode() + b"\0")
        return digest.hexdigest()


def load_pages(source: str | Path, *, num_pages: int | None = None, purpose: Purpose = "evaluation") -> Text:
    """
    Load a text source.

    Sources are `wikitext` (WikiText-2 from the hub: the test split to evaluate on, the train split to calibrate with),
    `default` (packaged text: held-out Wikipedia articles to evaluate on, C4 to calibrate with), `default-calibration`
    (that C4 text), or a file. A text file (.txt, .raw, .tokens) is split at WikiText titles or into `<doc …>…</doc>`
    articles, and is one page if it has neither; in .jsonl and .parquet files every row is a page, or a line of a
    WikiText file.

    :param source: The source's name, or a file's path.
    :param num_pages: How many pages to take, from the first on. None takes all.
    :param purpose: What the text is for.
    :return: The pages.
    :raises SourceError: If there is no such source, or it cannot be read, or has fewer pages.
    """
    if num_pages is not None:
        _validate_count("num_pages", num_pages, SourceError)
    source = str(source)
    if source == "wikitext":
        text = _load_hub_wikitext("test" if purpose == "evaluation" else "train")
    elif source == "default" and purpose == "evaluation":
        text = _load_default_evaluation()
    elif source in ("default", "default-calibration"):
        text = _load_default_calibration()
    else:
        text = _load_file(source)
    return _take(text, num_pages)


def token_batches(
    tokenizer: Any, text: Text, *, num_batches: int, length: int, batch_size: int = 1
) -> list[dict[str, torch.Tensor]]:
    """
    Cut a text into consecutive windows of tokens, to calibrate with.

    WikiText is detokenised first. Where the tokenizer starts every text with BOS, every window starts with it too, as
    whenever the model is used.

    :param tokenizer: The model's transformers tokenizer.
    :param text: The text; its pages are joined by blank lines.
    :param num_batches: How many batches.
    :param length: Tokens per window.
    :param batch_size: Windows per batch.
    :return: Model inputs, `input_ids` and `attention_mask`, each `[batch_size, length]`.
    :raises DatasetError: If the text is too short, or a number is not positive.
    """
    for name, value in (("num_batches", num_batches), ("length", length), ("batch_size", batch_size)):
        _validate_count(name, value, DatasetError)
    start = _leading_tokens(tokenizer)
    step = length - len(start)
    if step < 1:
        msg = f"length is {length}, which leaves no room for text after the tokenizer's BOS token"
        raise DatasetError(msg)
    tokens = _read_tokens(tokenizer, text, num_batches * batch_size * step)
    if len(tokens) < num_batches * batch_size * step:
        possible = len(tokens) // (batch_size * step)
        msg = (
            f"{text.name} is too short: its {len(tokens)} tokens make {possible} batches of {batch_size} x {length} "
            f"tokens, not {num_batches}"
        )
        raise DatasetError(msg)
    windows = torch.tensor([start + tokens[i * step : (i + 1) * step] for i in range(num_batches * batch_size)])
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in windows.split(batch_size)]


def _leading_tokens(tokenizer: Any) -> list[int]:
    tokens = tokenizer.encode("a")
    return tokens[:1] if tokens and tokens[0] == tokenizer.bos_token_id else []


def _read_tokens(tokenizer: Any, text: Text, limit: int) -> list[int]:
    """
    Tokenise as many pages as give enough tokens.

    :param tokenizer: The tokenizer.
    :param text: The text.
    :param limit: How many tokens are enough.
    :return: The tokens, without special ones.
    """
    tokens: list[int] = []
    for page in text.pages:
        if len(tokens) >= limit:
            break
        plain = detokenize(page) if text.is_wikitext else page
        tokens += tokenizer.encode(plain + "\n\n", add_special_tokens=False, verbose=False)
    return tokens


def _validate_count(name: str, value: int, error: type[Exception]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"{name} is {value!r}; it must be a whole number, at least 1"
        raise error(msg)


def _take(text: Text, num_pages: int | None) -> Text:
    """
    Check a text's pages and take the first ones.

    :param text: The text.
    :param num_pages: How many pages to take; None takes all.
    :return: The shortened text, whose name says so.
    :raises SourceError: If there are no pages, or fewer, or one is not Unicode text.
    """
    if not text.pages:
        msg = f"{text.name} contains no text"
        raise SourceError(msg)
    for number, page in enumerate(text.pages, start=1):
        try:
            page.encode()
        except UnicodeEncodeError as error:
            msg = f"page {number} of {text.name} contains a lone surrogate, which is not a character"
            raise SourceError(msg) from error
    if num_pages is None or num_pages == len(text.pages):
        return text
    if num_pages > len(text.pages):
        msg = f"{num_pages} pages asked for, but {text.name} has {len(text.pages)}"
        raise SourceError(msg)
    return Text(f"{text.name}, first {num_pages} of {len(text.pages)}", text.pages[:num_pages], text.is_wikitext)


def _load_default_evaluation() -> Text:
    from actsparse.assets import fetch_text

    articles, _ = _split_text(_read_text(fetch_text("wiki")))
    last = articles[-int(len(articles) * _HELD_OUT_SHARE) :]
    held_out = tuple(article for article in last if len(article.split()) >= _MIN_WORDS)
    return Text(f"packaged Wikipedia, {len(held_out)} held-out articles of {_MIN_WORDS} words or more", held_out)


def _load_default_calibration() -> Text:
    from actsparse.assets import fetch_text

    # The file has one document a line.
    documents = tuple(line for line in _read_text(fetch_text("c4")).split("\n") if line.strip())
    return Text(f"packaged C4, {len(documents)} documents", documents)


def _load_file(source: str) -> Text:
    path = Path(source)
    _validate_path(source, path)
    suffix = path.suffix.lower()
    if suffix in ROW_SUFFIXES:
        pages, is_wikitext = _split_rows(_read_jsonl(path) if suffix == ".jsonl" else _read_parquet(path))
        return Text(path.name, tuple(pages), is_wikitext)
    pages, has_titles = _split_text(_read_text(path))
    return Text(path.name, tuple(pages), has_titles or suffix != ".txt")


def _validate_path(source: str, path: Path) -> None:
    """
    Check that a source is a file of a kind that can be read.

    :param source: What the user wrote.
    :param path: The same as a path.
    :raises SourceError: If it is not.
    """
    suffixes = TEXT_SUFFIXES + ROW_SUFFIXES
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
        folder = path if is_folder else path.parent if path.parent.is_dir() else Path()
        names = [str(folder / entry.name) for entry in sorted(folder.iterdir()) if entry.suffix.lower() in suffixes]
    except (OSError, ValueError) as error:
        msg = f"{source!r} cannot be read: {_first_line(error)}"
        raise SourceError(msg) from error
    if is_folder:
        msg = f"{source!r} is a folder; give a file of it: {nearest(source, names)}"
    elif not is_file:
        msg = f"there is no text source or file {source!r}; nearest: {nearest(source, [*NAMED_SOURCES, *names])}"
    elif path.suffix.lower() not in suffixes:
        msg = f"{source!r} is not of a kind that can be read: {', '.join(suffixes)}"
    else:
        return
    raise SourceError(msg)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        msg = f"{path.name} cannot be read: {error.strerror or _first_line(error)}"
        raise SourceError(msg) from error
    if b"\0" in data:
        msg = f"{path.name} is a binary file, not text"
        raise SourceError(msg)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        msg = f"{path.name} is not UTF-8 text (at byte {error.start})"
        raise SourceError(msg) from error


def _split_text(text: str) -> tuple[list[str], bool]:
    """
    Split a text file into pages.

    :param text: The file's contents.
    :return: The pages, and whether they were found by WikiText titles.
    """
    articles = _split_articles(text)
    if articles is not None:
        return [article for article in articles if article], False
    if any(map(is_heading, text.split("\n"))):
        return split_pages(text), True
    return [text] if text.strip() else [], False


def _split_articles(text: str) -> list[str] | None:
    """
    Split text made of `<doc …>…</doc>` articles.

    :param text: The file's contents.
    :return: The articles, or None if the text is not made of them alone.
    """
    *parts, rest = text.split(_ARTICLE_END)
    starts = [_ARTICLE_START.match(part) for part in parts]
    if not parts or rest.strip():
        return None
    articles = [part[start.end() :].strip() for part, start in zip(parts, starts, strict=True) if start]
    return articles if len(articles) == len(parts) else None


def _split_rows(rows: list[str]) -> tuple[list[str], bool]:
    """
    Make pages of rows: each is one, unless they are the lines of a WikiText file, as in Salesforce/wikitext.

    :param rows: The rows' texts.
    :return: The pages, and whether they are WikiText.
    """
    lines = [row.removesuffix("\n") for row in rows]
    if len(lines) > 1 and any(map(is_heading, lines)) and not any("\n" in line for line in lines):
        return split_pages("".join((line or " ") + "\n" for line in lines)), True
    pages = [row for row in rows if row.strip()]
    return pages, any(is_heading(page.lstrip().split("\n", 1)[0]) for page in pages)


def _read_jsonl(path: Path) -> list[str]:
    rows: list[str] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            msg = f"line {number} of {path.name} is not JSON: {_first_line(error)}"
            raise SourceError(msg) from error
        if not isinstance(row, dict):
            msg = f"line {number} of {path.name} is not a JSON object with one of {', '.join(COLUMNS)}"
            raise SourceError(msg)
        column = _find_column(list(row), f"line {number} of {path.name}")
        rows.append(_check_cell(row[column], column, f"line {number} of {path.name}"))
    return rows


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        msg = "reading .parquet needs pyarrow: pip install 'actsparse[hub]'"
        raise SourceError(msg) from error
    try:
        with pq.ParquetFile(path) as file:
            column = _find_column(file.schema_arrow.names, path.name)
            cells = file.read(columns=[column]).column(column).to_pylist()
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        msg = f"{path.name} is not a readable Parquet file: {_first_line(error)}"
        raise SourceError(msg) from error
    return [_check_cell(cell, column, f"row {number} of {path.name}") for number, cell in enumerate(cells, start=1)]


def _find_column(names: list[str], where: str) -> str:
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


def _load_hub_wikitext(split: str) -> Text:
    """
    Load WikiText-2 from the hub, or from what its library has cached.

    :param split: Which part.
    :return: The text.
    :raises SourceError: If it cannot be had, soon and in one line where there is no network.
    """
    hint = "give a .raw file of WikiText-2, or `default`"
    try:
        import datasets
        import httpx
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        msg = f"`wikitext` comes from the hub and needs datasets: pip install 'actsparse[hub]'; or {hint}"
        raise SourceError(msg) from error
    problem = ""
    with _quiet_hub() as is_answering:
        for repository in _HUB_DATASETS:
            try:
                dataset = datasets.load_dataset(repository, "wikitext-2-raw-v1", split=split)
                rows = [row[_find_column(list(row), repository)] for row in map(dict, dataset)]
            except (OSError, ValueError, RuntimeError, httpx.HTTPError, DatasetsError) as error:
                problem = problem or _first_line(error)
                continue
            return Text(f"wikitext-2-raw {split} (hub)", tuple(_split_rows(rows)[0]), is_wikitext=True)
    problem = problem if is_answering else "it does not answer, and there is no copy in the cache"
    msg = f"`wikitext` cannot be had from the hub ({problem}); {hint}"
    raise SourceError(msg)


@contextmanager
def _quiet_hub() -> Iterator[bool]:
    """
    Silence the hub libraries' warnings, and keep them to their cache where the hub does not answer.

    They would otherwise retry for half a minute, and print every attempt.

    :return: A context manager that gives whether the hub answers.
    """
    from datasets import config
    from datasets.utils import logging as datasets_logging
    from huggingface_hub import logging as hub_logging

    levels = [(logging, logging.get_verbosity()) for logging in (datasets_logging, hub_logging)]
    was_offline = config.HF_HUB_OFFLINE
    try:
        for logging, _ in levels:
            logging.set_verbosity_error()
        is_answering = not was_offline and _does_hub_answer()
        config.HF_HUB_OFFLINE = not is_answering
        yield is_answering
    finally:
        config.HF_HUB_OFFLINE = was_offline
        for logging, level in levels:
            logging.set_verbosity(level)


def _does_hub_answer() -> bool:
    import httpx
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(_HUB_DATASETS[0], timeout=_HUB_TIMEOUT_S)
    except (OSError, httpx.HTTPError):
        return False
    return True


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
