"""Text sources: what a user names on the command line, as pages."""

from pathlib import Path
from typing import Literal

from actsparse.errors import SourceError
from actsparse.texts.default import load_default_calibration, load_default_evaluation, load_default_training
from actsparse.texts.files import load_file
from actsparse.texts.hub import load_hub_wikitext
from actsparse.texts.text import Text

Purpose = Literal["evaluation", "calibration", "training"]


def load_pages(source: str | Path, *, num_pages: int | None = None, purpose: Purpose = "evaluation") -> Text:
    """
    Load a text source.

    Sources are `wikitext` (WikiText-2 from the hub: the test split to evaluate on, the train split for the rest),
    `default` (packaged text: held-out Wikipedia articles to evaluate on, C4 to calibrate with, C4 and the other
    articles to train on), `default-calibration` (that C4 text), or a file. A text file (.txt, .raw, .tokens) is split
    at WikiText titles or into `<doc …>…</doc>` articles, and is one page if it has neither; in .jsonl and .parquet
    files every row is a page, or a line of a WikiText file.

    :param source: The source's name, or a file's path.
    :param num_pages: How many pages to take, from the first on. None takes all.
    :param purpose: What the text is for.
    :return: The pages.
    :raises SourceError: If there is no such source, or it cannot be read, or has fewer pages.
    """
    if num_pages is not None and (isinstance(num_pages, bool) or not isinstance(num_pages, int) or num_pages < 1):
        msg = f"num_pages is {num_pages!r}; it must be a whole number, at least 1"
        raise SourceError(msg)
    source = str(source)
    if source == "wikitext":
        text = load_hub_wikitext("test" if purpose == "evaluation" else "train")
    elif source == "default" and purpose == "evaluation":
        text = load_default_evaluation()
    elif source == "default" and purpose == "training":
        text = load_default_training()
    elif source in ("default", "default-calibration"):
        text = load_default_calibration()
    else:
        text = load_file(source)
    return _take(text, num_pages)


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
