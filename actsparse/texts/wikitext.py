"""The WikiText format: split a file into articles, and turn its tokenised text back into ordinary text."""

import re

# Order matters: later rules see what earlier ones left. Taken from lm-evaluation-harness, tasks/wikitext, version 2.
_CONTRACTIONS = (("s '", "s'"),)
# The harness puts this replacement in literally: a digit between slashes is lost there, so it is lost here.
_SLASHED_DIGIT = re.compile(r"/' [0-9]/")
_SLASHED_DIGIT_REPLACEMENT = "/'[0-9]/"
_SEPARATORS = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
)
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def is_heading(line: str) -> bool:
    """
    Tell whether a line is the title of an article (` = Title = `), not of a section (` = = Title = = `).

    :return: True for an article's title.
    """
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def split_pages(text: str) -> list[str]:
    """
    Split a WikiText file into articles, as the hub's EleutherAI/wikitext_document_level does.

    :param text: The contents of a `wiki.*.raw` or `wiki.*.tokens` file.
    :return: One string per article, its title first; what stands before the first title is a page too unless blank.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if is_heading(line):
            pages.append([])
        pages[-1].append(line)
    joined = ("\n".join(lines) for lines in pages)
    return [page for page in joined if page.strip()]


def detokenize(page: str) -> str:
    """
    Undo WikiText's tokenisation, byte for byte as lm-evaluation-harness (task `wikitext`, version 2) does.

    :param page: An article as the file has it: spaces around punctuation, ` @-@ ` for hyphens.
    """
    page = _replace_all(page, _CONTRACTIONS)
    page = _SLASHED_DIGIT.sub(_SLASHED_DIGIT_REPLACEMENT, page)
    page = _replace_all(page, _SEPARATORS)
    for opening, closing in _PAIRS:
        page = _trim_inside(page, opening, closing)
    return _replace_all(page, _REST)


def _replace_all(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for old, new in rules:
        text = text.replace(old, new)
    return text


def _trim_inside(text: str, opening: str, closing: str) -> str:
    r"""
    Drop the spaces just inside brackets or quotes: `( a )` becomes `(a)`.

    The harness's pattern, `\(\s*([^)]*?)\s*\)`, always pairs an opening bracket with the next closing one, so two
    searches give the same text, and in linear time where the pattern is cubic on unclosed brackets.

    :param text: The text to change.
    :param opening: The opening bracket or quote.
    :param closing: The closing one; may be the same character.
    :return: The text without those spaces.
    """
    pieces: list[str] = []
    done = 0
    while (start := text.find(opening, done)) >= 0 and (end := text.find(closing, start + 1)) >= 0:
        pieces += (text[done:start], opening, text[start + 1 : end].strip(), closing)
        done = end + 1
    return "".join(pieces) + text[done:]
