"""Where a text's pages begin and end."""

import re

from actsparse.texts.wikitext import is_heading, split_pages

_ARTICLE_START = re.compile(r'\s*<doc(?:\s+\w+="[^"]*")*\s*>')
_ARTICLE_END = "</doc>"


def split_text(text: str) -> tuple[list[str], bool]:
    """
    Split a text file into pages.

    :return: The pages, and whether they were found by WikiText titles.
    """
    articles = _split_articles(text)
    if articles is not None:
        return [article for article in articles if article], False
    if any(map(is_heading, text.split("\n"))):
        return split_pages(text), True
    return [text] if text.strip() else [], False


def split_rows(rows: list[str]) -> tuple[list[str], bool]:
    """
    Make pages of rows: each is one, unless they are the lines of a WikiText file, as in Salesforce/wikitext.

    :return: The pages, and whether they are WikiText.
    """
    rows = [unify_line_ends(row) for row in rows]
    lines = [row.removesuffix("\n") for row in rows]
    if len(lines) > 1 and any(map(is_heading, lines)) and not any("\n" in line for line in lines):
        return split_pages("".join((line or " ") + "\n" for line in lines)), True
    pages = [row for row in rows if row.strip()]
    return pages, any(is_heading(page.lstrip().split("\n", 1)[0]) for page in pages)


def unify_line_ends(text: str) -> str:
    """Write a text alike, whatever wrote it and whatever holds it: lines end in one character, no mark is in front."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _split_articles(text: str) -> list[str] | None:
    """Split text made of `<doc …>…</doc>` articles."""
    *parts, rest = text.split(_ARTICLE_END)
    starts = [_ARTICLE_START.match(part) for part in parts]
    if not parts or rest.strip():
        return None
    articles = [part[start.end() :].strip() for part, start in zip(parts, starts, strict=True) if start]
    return articles if len(articles) == len(parts) else None
