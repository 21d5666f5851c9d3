"""Word perplexity of a causal language model, as lm-evaluation-harness's task `wikitext` (version 2) defines it."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from actsparse.backend import language_model
from actsparse.errors import SourceError
from actsparse.evaluation.windows import WindowedText, measure_losses, text_config


@dataclass(frozen=True)
class WordPerplexity:
    """
    What a model makes of a text. All four measures come from one sum of log-likelihoods over the whole text.

    Words and bytes are those of the pages as given; tokens are those of the detokenised pages. A perplexity too large
    for a float is infinity.
    """

    word_perplexity: float
    token_perplexity: float
    """Not comparable between tokenizers."""
    byte_perplexity: float
    bits_per_byte: float
    negative_log_likelihood: float
    """Summed over all tokens, in nats."""
    num_words: int
    num_tokens: int
    num_bytes: int
    num_pages: int
    max_length: int
    """The window, in tokens."""


def word_perplexity(
    model: Any,
    tokenizer: Any,
    pages: Iterable[str],
    *,
    max_length: int | None = None,
    progress: bool = True,
) -> WordPerplexity:
    """
    Measure a model's word perplexity as lm-evaluation-harness's task `wikitext` (version 2) does.

    Each page is detokenised and scored in windows of `max_length` tokens. Its first token is predicted from the
    tokenizer's BOS (or else EOS) token, a later window's first from the token before it; the last window is moved back
    to be full. Words are counted on the page as given. The result is over all pages together.

    :param model: A causal language model: a module that returns `.logits`, an `openvino.Model` or an optimum-intel one.
        It is evaluated in eval mode and comes back as it was. Its log-probabilities are computed in fp32 whatever its
        dtype. OpenVINO computes everything in fp32 here, whatever the model is set to, so that what is measured is the
        model and not the machine.
    :param tokenizer: The model's transformers tokenizer.
    :param pages: The original pages, before detokenisation.
    :param max_length: The window in tokens. None takes 2048 or, if that is less, the model's own limit.
    :param progress: Whether to show a progress bar; it is never shown where stderr is not a terminal.
    :return: The perplexities and what they were computed from.
    :raises SourceError: If the pages are no text at all, or the tokenizer does not fit the task or the model.
    :raises ActsparseError: If `max_length` is not possible for this model, or the model's outputs cannot be scored.
    """
    page_list = _validate_pages(pages)
    model = language_model(model)
    text = WindowedText.of(model, tokenizer, page_list, max_length)
    num_tokens = int(text.num_scored.sum())
    _validate_tokens(model, text, num_tokens)
    loss = math.fsum(measure_losses(model, text, description="word perplexity", progress=progress))
    num_words = count_words(page_list)
    num_bytes = sum(len(page.encode()) for page in page_list)
    return WordPerplexity(
        word_perplexity=exp_or_infinity(loss / num_words),
        token_perplexity=exp_or_infinity(loss / num_tokens),
        byte_perplexity=exp_or_infinity(loss / num_bytes),
        bits_per_byte=loss / num_bytes / math.log(2),
        negative_log_likelihood=loss,
        num_words=num_words,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_pages=len(page_list),
        max_length=text.max_length,
    )


def exp_or_infinity(exponent: float) -> float:
    """
    Make a perplexity of a loss.

    :param exponent: The loss.
    :return: Its exponential; infinity where that is too large for a float.
    """
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


def count_words(pages: Iterable[str]) -> int:
    """
    Count words as the harness does.

    :param pages: The original pages.
    :return: How many words they have.
    """
    return sum(len(re.split(r"\s+", page)) for page in pages)


def _validate_pages(pages: Iterable[str]) -> list[str]:
    if isinstance(pages, str):
        msg = "pages is one string; give a list of pages, or split it with split_pages"
        raise SourceError(msg)
    page_list = list(pages)
    if not page_list:
        msg = "there are no pages to evaluate"
        raise SourceError(msg)
    for number, page in enumerate(page_list, start=1):
        if not isinstance(page, str):
            msg = f"page {number} is of type {type(page).__name__}; pages are strings"
            raise SourceError(msg)
    if not any(page.strip() for page in page_list):
        msg = f"all {len(page_list)} pages are blank"
        raise SourceError(msg)
    return page_list


def _validate_tokens(model: Any, text: WindowedText, num_tokens: int) -> None:
    if num_tokens == 0:
        msg = "the tokenizer makes no token of these pages"
        raise SourceError(msg)
    vocabulary = getattr(text_config(model), "vocab_size", None)
    largest = max(int(ids.max()) for ids in text.page_ids)
    if isinstance(vocabulary, int) and largest >= vocabulary:
        msg = f"the tokenizer gives token {largest}, but the model knows {vocabulary}: they do not belong together"
        raise SourceError(msg)
