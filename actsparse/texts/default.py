"""The packaged texts, which need no hub."""

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
    from actsparse.assets import fetch_text

    articles, _ = split_text(read_text(fetch_text("wiki")))
    held_out = articles[len(articles) - int(len(articles) * _HELD_OUT_SHARE) :]
    pages = tuple(article for article in held_out if len(article.split()) >= _MIN_WORDS)
    return Text(f"packaged Wikipedia, {len(pages)} held-out articles of {_MIN_WORDS} words or more", pages)


def load_default_calibration() -> Text:
    """
    Load the packaged text to calibrate with.

    :return: Documents of C4.
    """
    from actsparse.assets import fetch_text

    # The file has one document a line.
    documents = tuple(line for line in read_text(fetch_text("c4")).split("\n") if line.strip())
    return Text(f"packaged C4, {len(documents)} documents", documents)
