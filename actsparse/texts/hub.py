"""WikiText-2 from the hub."""

from collections.abc import Iterator
from contextlib import contextmanager

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
                rows = [row[find_column(list(row), repository)] for row in map(dict, dataset)]
            except (OSError, ValueError, RuntimeError, httpx.HTTPError, DatasetsError) as error:
                problem = problem or shorten_message(error)
                continue
            return Text(f"wikitext-2-raw {split} (hub)", tuple(split_rows(rows)[0]), is_wikitext=True)
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
