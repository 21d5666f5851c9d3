"""Text in windows, as lm-evaluation-harness cuts it, and the one loop that scores them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from actsparse.errors import ActsparseError, SourceError
from actsparse.runtime import distributed
from actsparse.runtime.progress import progress_bar
from actsparse.texts.wikitext import detokenize
from actsparse.torch.blockwise import run_blockwise
from actsparse.torch.logits import sum_losses
from actsparse.torch.running import evaluation_mode

DEFAULT_MAX_LENGTH = 2048
# The names transformers' configs give a model's longest input, in the harness's order.
_LENGTH_ATTRIBUTES = ("n_positions", "max_position_embeddings", "n_ctx")


class Window(NamedTuple):
    """One forward pass: the model reads `tokens[start:end]` and its last `num_scored` outputs are scored."""

    start: int
    end: int
    num_scored: int


@dataclass(frozen=True)
class WindowedText:
    """
    Pages as a model reads them.

    :param page_ids: Their tokens, each behind the token from which its first one is predicted, [tokens + 1].
    :param windows: The page of each window, from 0 on, and the window.
    :param max_length: The longest window, in tokens.
    """

    pages: Sequence[str]
    page_ids: list[torch.Tensor]
    windows: list[tuple[int, Window]]
    max_length: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, pages: Sequence[str], max_length: int | None) -> "WindowedText":
        """
        Detokenise, tokenise and cut pages.

        :param model: The model; its `config`, if it has one, limits the windows.
        :param max_length: The longest window, in tokens; None takes 2048 or, if that is less, the model's own limit.
        :raises SourceError: If the tokenizer does not fit the task, or a page is no text.
        :raises ActsparseError: If `max_length` is not possible for this model.
        """
        length = resolve_max_length(model, tokenizer, max_length)
        prefix = prefix_token(tokenizer)
        page_ids = [torch.tensor([prefix, *encode_page(tokenizer, detokenize(page), prefix)]) for page in pages]
        windows = [(page, w) for page, ids in enumerate(page_ids) for w in rolling_windows(len(ids) - 1, length)]
        return cls(pages, page_ids, windows, length)

    @property
    def num_scored(self) -> np.ndarray:
        """How many tokens of each window are scored, [windows]."""
        return np.array([window.num_scored for _, window in self.windows], np.float64)

    def name_page(self, number: int) -> str:
        """Name the page of a window, for an error message."""
        page = self.windows[number][0]
        return f"page {page + 1} of {len(self.pages)}, {_first_words(self.pages[page])!r}"


def rolling_windows(num_tokens: int, max_length: int) -> Iterator[Window]:
    """
    Cover a page with windows, each token scored once.

    Positions count from the prefix token: token i of the page stands at i + 1, and is scored by the output at i.

    :param num_tokens: How many tokens the page has, without the prefix token.
    :return: The windows in order; all but a short page's only one are `max_length` long.
    """
    for scored in range(0, num_tokens, max_length):
        end = min(scored + max_length, num_tokens)
        yield Window(max(0, end - max_length), end, end - scored)


def score_windows(
    model: Any,
    text: WindowedText,
    score: Callable[[torch.Tensor, Window], Sequence[float]],
    *,
    width: int = 1,
    description: str,
    progress: bool = True,
    is_finite: bool = False,
    is_blockwise: bool = True,
) -> np.ndarray:
    """
    Score every window, each process its share; an offloaded model's blocks are loaded once for many windows.

    :param model: The model; it is in evaluation mode meanwhile, and gives no gradients.
    :param score: Runs the model on a page's tokens and a window, and gives numbers.
    :param is_finite: Whether infinity is refused too: a perplexity may be infinite, a difference of losses not.
    :param is_blockwise: Whether runs may be interleaved: not where `score` changes the model for a while.
    :return: The numbers, [windows, numbers].
    :raises ActsparseError: If one of them is NaN; names the page.
    """
    rows = np.zeros((len(text.windows), width))
    own = distributed.share(range(len(text.windows)))
    total = sum(text.windows[number][1].num_scored for number in own)
    bar = progress_bar(description, total=total, unit="tokens", is_wanted=progress)
    with evaluation_mode(model), torch.no_grad(), bar as advance:

        def run(number: int) -> None:
            if np.isnan(rows).any():
                return  # the result is lost already
            page, window = text.windows[number]
            rows[number] = score(text.page_ids[page], window)
            advance(window.num_scored)

        jobs = [partial(run, number) for number in own]
        if is_blockwise:
            run_blockwise(model, jobs)
        else:
            for job in jobs:
                job()
    distributed.add_up_array(rows)
    require_numbers(rows, text, is_finite=is_finite)
    return rows


def measure_losses(
    model: Any, text: WindowedText, *, description: str, progress: bool = True, is_finite: bool = False
) -> np.ndarray:
    """
    Sum up what each window costs; the rest is as for `score_windows`.

    :return: The negative log-likelihood of each window in nats, [windows].
    """

    def score(ids: torch.Tensor, window: Window) -> Sequence[float]:
        return (sum_losses(*score_window(model, ids, window)),)

    return score_windows(model, text, score, description=description, progress=progress, is_finite=is_finite)[:, 0]


def require_numbers(rows: np.ndarray, text: WindowedText, *, is_finite: bool) -> None:
    """
    Make sure that windows have scores.

    :param rows: What was found, [windows, numbers].
    :param text: The windows.
    :param is_finite: Whether infinity is refused too.
    :raises ActsparseError: If one is missing; names the page.
    """
    is_infinite, is_nan = np.isinf(rows).any(1), np.isnan(rows).any(1)
    # First, because an infinite loss makes a divergence that is no number.
    if is_finite and is_infinite.any():
        msg = f"the model rules out a token of {text.name_page(int(is_infinite.argmax()))}: its loss there is infinite"
        raise ActsparseError(msg)
    if is_nan.any():
        msg = f"the model's logits contain NaN on {text.name_page(int(is_nan.argmax()))}"
        raise ActsparseError(msg)


def score_window(model: Any, ids: torch.Tensor, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Run a model on one window.

    :param model: The model, in eval mode.
    :param ids: The page's tokens after the prefix token, `[tokens + 1]`.
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


def resolve_max_length(model: Any, tokenizer: Any, max_length: int | None) -> int:
    """
    Check the window against the model's limit, which is found as the harness finds it.

    :param model: The model; its `config`, if it has one, names the limit.
    :param tokenizer: Asked for its `model_max_length` where the config has none.
    :raises ActsparseError: If the window is not a positive whole number, or more than the config allows.
    """
    config = text_config(model)
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


def text_config(model: Any) -> Any:
    """
    Find the part of a model's configuration that is about text.

    :return: The configuration; None where there is none.
    """
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config


def prefix_token(tokenizer: Any) -> int:
    """
    Choose the token from which a page's first token is predicted.

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


def _takes_use_cache(model: Any) -> bool:
    return "use_cache" in inspect.signature(getattr(model, "forward", model)).parameters


def _device(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        parameter = next(model.parameters(), None)
        # Offloaded weights have no device of their own; accelerate's hooks move what the model reads.
        return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device
    device = getattr(model, "device", "cpu")
    return device if isinstance(device, torch.device) else torch.device("cpu")


def _first_words(page: str) -> str:
    return " ".join(page[:200].split())[:60]
