"""Which windows of a text a case calibrates on."""

from typing import Any

import numpy as np
import torch

from actsparse.errors import DatasetError
from actsparse.texts import Text, take_batches, token_batches


def draw_batches(
    tokenizer: Any, text: Text, *, num_batches: int, length: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """
    Take windows of a text to calibrate with; equal arguments give equal windows.

    :param tokenizer: The model's tokenizer.
    :param text: The text.
    :param num_batches: How many windows.
    :param length: Tokens of each.
    :param seed: 0 takes the first ones, as `token_batches`; another number chooses at random among all of the text.
    :return: Model inputs.
    :raises DatasetError: If the text is too short.
    """
    if seed == 0:
        return token_batches(tokenizer, text, num_batches=num_batches, length=length)
    # A window has a token at least, and a token a byte: more there cannot be.
    most = sum(len(page.encode()) + 2 for page in text.pages)
    windows = take_batches(tokenizer, text, most=most, length=length)
    if len(windows) < num_batches:
        msg = f"{text.name} is too short: it makes {len(windows)} windows of {length} tokens, not {num_batches}"
        raise DatasetError(msg)
    chosen = np.random.default_rng(seed).choice(len(windows), num_batches, replace=False)
    return [windows[number] for number in sorted(chosen)]
