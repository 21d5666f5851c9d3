"""Datasets from the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from actsparse.errors import SourceError, shorten_message
from actsparse.texts.pages import split_rows
from actsparse.texts.rows import find_column
from actsparse.texts.text import Text

# The first holds an article a row; the second, a line a row, serves who has only that one cached.
_HUB_DATASETS = ("EleutherAI/wikitext_document_level", "Salesforce/wikitext")
_HUB_TIMEOUT_S = 5


def load_hub_wikitext(split: str) -> Text:
    """
    Load WikiText-2 from the hub, or from what its library has cached.

    :param split: Which part, `train`, `validation` or `test`.
    :raises SourceError: If it cannot be had, soon and in one line where there is no network.
    """
    name = "wikitext-2-raw-v1"
    try:
        rows = load_hub_rows(name, split, *_HUB_DATASETS)
    except SourceError as error:
        msg = f"`wikitext` cannot be had from the hub: {error}; give a .raw file of WikiText-2, or `default`"
        raise SourceError(msg) from error
    texts = [row[find_column(list(row), name)] for row in rows]
    return Text(f"wikitext-2-raw {split} (hub)", tuple(split_rows(texts)[0]), is_wikitext=True)


def load_hub_rows(name: str, split: str, *repositories: str) -> list[dict[str, Any]]:
    """
    Load a dataset from the hub, or from what its library has cached.

    :param repositories: Where it may be; the first that has it is taken.
    :raises SourceError: If it cannot be had, soon and in one line where there is no network.
    """
    try:
        import datasets
        import httpx
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        msg = "datasets is not installed: pip install 'actsparse[hub]'"
        raise SourceError(msg) from error
    problem = ""
    with _quiet_hub(repositories[0]) as is_answering:
        for repository in repositories:
            try:
                return [dict(row) for row in datasets.load_dataset(repository, name, split=split)]
            except (OSError, ValueError, RuntimeError, httpx.HTTPError, DatasetsError) as error:
                problem = problem or shorten_message(error)
    raise SourceError(problem if is_answering else "it does not answer, and there is no copy in the cache")


@contextmanager
def _quiet_hub(repository: str) -> Iterator[bool]:
    """
    Silence the hub libraries' warnings, and keep them to their cache where the hub does not answer.

    They would otherwise retry for half a minute, and print every attempt.
    """
    from datasets import config
    from datasets.utils import logging as datasets_logging
    from huggingface_hub import logging as hub_logging

    levels = [(logging, logging.get_verbosity()) for logging in (datasets_logging, hub_logging)]
    was_offline = config.HF_HUB_OFFLINE
    try:
        for logging, _ in levels:
            logging.set_verbosity_error()
        is_answering = not was_offline and _does_hub_answer(repository)
        config.HF_HUB_OFFLINE = not is_answering
        yield is_answering
    finally:
        config.HF_HUB_OFFLINE = was_offline
        for logging, level in levels:
            logging.set_verbosity(level)


def _does_hub_answer(repository: str) -> bool:
    import httpx
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT_S)
    except (OSError, httpx.HTTPError):
        return False
    return True
