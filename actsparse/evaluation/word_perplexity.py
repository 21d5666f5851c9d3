"""Word perplexity of a causal language model, as lm-evaluation-harness's task `wikitext` (version 2) defines it."""

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from actsparse import distributed
from actsparse.calibration import evaluation_mode
from actsparse.errors import ActsparseError, SourceError
from actsparse.evaluation.wikitext import detokenize
from actsparse.lockstep import run_side_by_side
from actsparse.logits import sum_losses
from actsparse.openvino.detect import find_openvino_model
from actsparse.progress import progress_bar

DEFAULT_MAX_LENGTH = 2048
# The names transformers' configs give a model's longest input, in the harness's order.
_LENGTH_ATTRIBUTES = ("n_positions", "max_position_embeddings", "n_ctx")


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


class Window(NamedTuple):
    """One forward pass: the model reads `tokens[start:end]` and its last `num_scored` outputs are scored."""

    start: int
    end: int
    num_scored: int


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
    model = _as_callable(model)
    window_length = resolve_max_length(model, tokenizer, max_length)
    prefix = prefix_token(tokenizer)
    page_tokens = [encode_page(tokenizer, detokenize(page), prefix) for page in page_list]
    num_tokens = sum(map(len, page_tokens))
    _validate_tokens(model, prefix, page_tokens, num_tokens)

    loss = _score_pages(model, page_list, page_tokens, prefix, window_length, progress)
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
        max_length=window_length,
    )


def rolling_windows(num_tokens: int, max_length: int) -> Iterator[Window]:
    """
    Cover a page with windows, each token scored once.

    Positions count from the prefix token: token i of the page stands at i + 1, and is scored by the output at i.

    :param num_tokens: How many tokens the page has, without the prefix token.
    :param max_length: The longest input.
    :return: The windows in order; all but a short page's only one are `max_length` long.
    """
    for scored in range(0, num_tokens, max_length):
        end = min(scored + max_length, num_tokens)
        yield Window(max(0, end - max_length), end, end - scored)


def _score_pages(
    model: Any, pages: list[str], page_tokens: list[list[int]], prefix: int, max_length: int, progress: bool
) -> float:
    """
    Sum the negative log-likelihood of all pages.

    :param model: The model.
    :param pages: The pages, to name one in an error.
    :param page_tokens: Each page's tokens.
    :param prefix: The token that every page's first token is predicted from.
    :param max_length: The window in tokens.
    :param progress: Whether to show a progress bar.
    :return: The sum, in nats.
    :raises ActsparseError: If it is not a number.
    """
    places = [(page, window) for page, x in enumerate(page_tokens) for window in rolling_windows(len(x), max_length)]
    page_ids = [torch.tensor([prefix, *tokens]) for tokens in page_tokens]
    losses = np.zeros(len(places))
    own = distributed.share(range(len(places)))
    num_tokens = sum(places[number][1].num_scored for number in own)
    bar = progress_bar("word perplexity", total=num_tokens, unit="tokens", is_wanted=progress)
    with evaluation_mode(model), torch.no_grad(), bar as advance:

        def score(number: int) -> None:
            if np.isnan(losses).any():
                return  # the result is lost already
            page, window = places[number]
            losses[number] = sum_losses(*score_window(model, page_ids[page], window))
            advance(window.num_scored)

        run_side_by_side(model, [partial(score, number) for number in own])
    distributed.add_up_array(losses)
    refuse_nan(losses, [page for page, _ in places], pages)
    return math.fsum(losses)


def score_window(model: Any, ids: torch.Tensor, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Run a model on one window.

    :param model: The model, in eval mode.
    :param ids: The page's tokens after the prefix token, `[tokens + 1]`.
    :param window: What to read and what to score.
    :return: Logits, `[scored, vocabulary]`, and the tokens that they should predict, `[scored]`.
    :raises ActsparseError: If the model gives no such logits.
    """
    inputs = ids[window.start : window.end].unsqueeze(0).to(_device(model))
    kwargs = {"use_cache": False} if _takes_use_cache(model) else {}
    output = model(inputs, **kwargs)
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[1] < window.num_scored:
        shown = type(output).__name__ if logits is None else f"logits of shape {list(logits.shape)}"
        wanted = "a causal language model returns .logits of [1, tokens, vocabulary]"
        msg = f"{type(model).__name__} returned {shown}; {wanted}"
        raise ActsparseError(msg)
    targets = ids[window.end - window.num_scored + 1 : window.end + 1].to(logits.device)
    return logits[0, -window.num_scored :], targets


def refuse_nan(losses: np.ndarray, page_of: Sequence[int], pages: Sequence[str]) -> None:
    """
    Make sure that windows have losses.

    :param losses: The sum of each window's negative log-likelihoods, [windows].
    :param page_of: The page that each window is of, from 0 on.
    :param pages: The pages.
    :raises ActsparseError: If one is NaN; names the page.
    """
    if np.isnan(losses).any():
        page = page_of[int(np.isnan(losses).argmax())]
        msg = f"the model's logits contain NaN on page {page + 1} of {len(pages)}, {_first_words(pages[page])!r}"
        raise ActsparseError(msg)


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


def _as_callable(model: Any) -> Any:
    openvino_model = find_openvino_model(model)
    if openvino_model is None:
        return model
    from actsparse.openvino.runner import OpenVinoLanguageModel, Runner

    return OpenVinoLanguageModel(Runner(openvino_model), getattr(model, "config", None))


def _takes_use_cache(model: Any) -> bool:
    return "use_cache" in inspect.signature(getattr(model, "forward", model)).parameters


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


def resolve_max_length(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """
    Check the window against the model's limit, which is found as the harness finds it.

    :param model: The model; its `config`, if it has one, names the limit.
    :param tokenizer: Asked for its `model_max_length` where the config has none.
    :param max_length: What the caller gave.
    :return: The window to use.
    :raises ActsparseError: If the window is not a positive whole number, or more than the config allows.
    """
    config = _text_config(model)
    limits = (getattr(config, name, None) for name in _LENGTH_ATTRIBUTES)
    limit = next((limit for limit in limits if isinstance(limit, int)), None)
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit or getattr(tokenizer, "model_max_length", DEFAULT_MAX_LENGTH))
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        msg = f"max_length is {max_length!r}; it must be a whole number of tokens, at least 1"
        raise ActsparseError(msg)
    if limit is not None and max_length > limit:
        msg = f"max_length is {max_length}, but this model reads at most {limit} tokens"
        raise ActsparseError(msg)
    return max_length


def _text_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def prefix_token(tokenizer: Any) -> int:
    """
    Choose the token from which a page's first token is predicted.

    :param tokenizer: The tokenizer.
    :return: Its BOS token, or else its EOS token.
    :raises SourceError: If it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    msg = "the tokenizer has neither a BOS nor an EOS token, from which a page's first token is predicted"
    raise SourceError(msg)


def encode_page(tokenizer: Any, text: str, prefix: int) -> list[int]:
    """
    Tokenise a page as the harness does: with the tokenizer's own special tokens, unless the text brings its BOS.

    :param tokenizer: The tokenizer.
    :param text: The detokenised page.
    :param prefix: The token a page starts with.
    :return: The page's tokens, all of which are scored.
    :raises SourceError: If the text is not valid Unicode.
    """
    kwargs = {"add_special_tokens": False} if text.startswith(tokenizer.decode(prefix)) else {}
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = f"the page {_first_words(text)!r} contains a lone surrogate, which is not a character"
        raise SourceError(msg) from error
    # verbose=False: no warning that a whole page exceeds the model's limit, as it is cut into windows.
    return tokenizer.encode(text, verbose=False, **kwargs)


def _validate_tokens(model: Any, prefix: int, page_tokens: list[list[int]], num_tokens: int) -> None:
    if num_tokens == 0:
        msg = "the tokenizer makes no token of these pages"
        raise SourceError(msg)
    vocabulary = getattr(_text_config(model), "vocab_size", None)
    largest = max(prefix, max(max(tokens, default=0) for tokens in page_tokens))
    if isinstance(vocabulary, int) and largest >= vocabulary:
        msg = f"the tokenizer gives token {largest}, but the model knows {vocabulary}: they do not belong together"
        raise SourceError(msg)


def _device(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        parameter = next(model.parameters(), None)
        # Offloaded weights have no device of their own; accelerate's hooks move what the model reads.
        return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
    device = getattr(model, "device", "cpu")
    return device if isinstance(device, torch.device) else torch.device("cpu")


def _first_words(page: str) -> str:
    return " ".join(page[:200].split())[:60]
