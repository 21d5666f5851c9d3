"""The packaged texts, which need no hub."""

from collections.abc import Sequence

from actsparse.texts.files import read_text
from actsparse.texts.pages import split_text
from actsparse.texts.text import Text

# The share of the packaged Wikipedia articles, from the file's end, that `default` evaluates on.
_HELD_OUT_SHARE = 0.25
# Two thirds of those are stubs, some only a title, which say little of a model and much of its first guess.
_MIN_WORDS = 100


def load_default_evaluation() -> Text:
    """
    Load the packaged text to evaluate on.

    :return: The longer ones of the last Wikipedia articles, in the file's order.
    """
    from actsparse.storage.assets import fetch_text

    articles = split_text(read_text(fetch_text("wiki")))[0]
    pages = _longer(articles[_first_held_out(articles) :])
    return Text(f"packaged Wikipedia, {len(pages)} held-out articles of {_MIN_WORDS} words or more", pages)


def load_default_calibration() -> Text:
    """
    Load the packaged text to calibrate with.

    :return: Documents of C4.
    """
    from actsparse.storage.assets import fetch_text

    # The file has one document a line.
    documents = tuple(line for line in read_text(fetch_text("c4")).split("\n") if line.strip())
    return Text(f"packaged C4, {len(documents)} documents", documents)


def load_default_training() -> Text:
    """
    Load the packaged text to train on.

    :return: The longer ones of the Wikipedia articles that `default` does not evaluate on, and the documents of C4.
    """
    from actsparse.storage.assets import fetch_text

    articles = split_text(read_text(fetch_text("wiki")))[0]
    pages = _longer(articles[: _first_held_out(articles)])
    documents = load_default_calibration().pages
    return Text(
        f"packaged Wikipedia and C4, {len(pages)} articles and {len(documents)} documents", (*documents, *pages)
    )


def _first_held_out(articles: Sequence[str]) -> int:
    return len(articles) - int(len(articles) * _HELD_OUT_SHARE)


def _longer(articles: Sequence[str]) -> tuple[str, ...]:
    return tuple(article for article in articles if len(article.split()) >= _MIN_WORDS)
