"""Batches of tokens to calibrate with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from actsparse.errors import DatasetError
from actsparse.texts.bos import leading_tokens
from actsparse.texts.text import Text
from actsparse.texts.wikitext import detokenize


def token_batches(
    tokenizer: Any, text: Text, *, num_batches: int, length: int, batch_size: int = 1
) -> list[dict[str, torch.Tensor]]:
    """
    Cut a text into consecutive windows of tokens, to calibrate with.

    WikiText is detokenised first. Where the tokenizer starts every text with BOS, every window starts with it too, as
    whenever the model is used.

    :param tokenizer: The model's transformers tokenizer.
    :param text: The text; its pages are joined by blank lines.
    :param num_batches: How many batches.
    :param length: Tokens per window.
    :param batch_size: Windows per batch.
    :return: Model inputs, `input_ids` and `attention_mask`, each `[batch_size, length]`.
    :raises DatasetError: If the text is too short, or a number is not positive.
    """
    start, step = _lay_out(tokenizer, num_batches, length, batch_size)
    tokens = _read_tokens(tokenizer, text, num_batches * batch_size * step)
    if len(tokens) < num_batches * batch_size * step:
        possible = len(tokens) // (batch_size * step)
        msg = (
            f"{text.name} is too short: its {len(tokens)} tokens make {possible} batches of {batch_size} x {length} "
            f"tokens, not {num_batches}"
        )
        raise DatasetError(msg)
    return _cut(tokens, start, step, num_batches, batch_size)


def take_batches(
    tokenizer: Any, text: Text, *, most: int, length: int, batch_size: int = 1
) -> list[dict[str, torch.Tensor]]:
    """
    Cut a text into as many batches as it makes, up to a limit; otherwise as `token_batches`.

    :param tokenizer: The model's transformers tokenizer.
    :param text: The text.
    :param most: How many batches are enough.
    :param length: Tokens per window.
    :param batch_size: Windows per batch.
    :return: Model inputs; none where the text is shorter than a batch.
    """
    start, step = _lay_out(tokenizer, most, length, batch_size)
    tokens = _read_tokens(tokenizer, text, most * batch_size * step)
    return _cut(tokens, start, step, min(most, len(tokens) // (batch_size * step)), batch_size)


def _lay_out(tokenizer: Any, num_batches: int, length: int, batch_size: int) -> tuple[list[int], int]:
    """Check the numbers; return what every window starts with, and how many tokens of text it has."""
    for name, value in (("num_batches", num_batches), ("length", length), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            msg = f"{name} is {value!r}; it must be a whole number, at least 1"
            raise DatasetError(msg)
    start = leading_tokens(tokenizer)
    if length <= len(start):
        msg = f"length is {length}, which leaves no room for text after the tokenizer's BOS token"
        raise DatasetError(msg)
    return start, length - len(start)


def _cut(
    tokens: list[int], start: list[int], step: int, num_batches: int, batch_size: int
) -> list[dict[str, torch.Tensor]]:
    if not num_batches:
        return []
    windows = torch.tensor([start + tokens[i * step : (i + 1) * step] for i in range(num_batches * batch_size)])
    return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in windows.split(batch_size)]


def describe_batches(tokenizer: Any, batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """
    Say what was calibrated on, for a report.

    :param tokenizer: The model's tokenizer.
    :param batches: What `token_batches` made.
    :return: How many windows of how many tokens, and whether each begins with BOS.
    """
    windows, length = sum(len(batch["input_ids"]) for batch in batches), batches[0]["input_ids"].shape[1]
    start = "each beginning with BOS" if leading_tokens(tokenizer) else "none beginning with BOS"
    return f"{windows} x {length} tokens, {start}"


def _read_tokens(tokenizer: Any, text: Text, limit: int) -> list[int]:
    """
    Tokenise as many pages as give enough tokens.

    :param tokenizer: The tokenizer.
    :param text: The text.
    :param limit: How many tokens are enough.
    :return: The tokens, without special ones.
    """
    tokens: list[int] = []
    for page in text.pages:
        if len(tokens) >= limit:
            break
        plain = detokenize(page) if text.is_wikitext else page
        tokens += tokenizer.encode(plain + "\n\n", add_special_tokens=False, verbose=False)
    return tokens
