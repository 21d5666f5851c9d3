"""The token that texts begin with, on which many models hang much."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

_logger = logging.getLogger(__name__)


def warn_of_missing_bos(tokenizer: Any, batch: Any) -> None:
    """
    Warn where a tokenizer begins texts with BOS, and model inputs do not.

    Models hang much on that token: activations, and so thresholds, are others without it.

    :param batch: A model input; one without `input_ids` says nothing.
    """
    start = leading_tokens(tokenizer)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not start or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return
    mask = batch.get("attention_mask")
    is_token = (
        mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
    )
    # Behind padding on the left, if there is any.
    firsts = ids.gather(1, is_token.int().argmax(1, keepdim=True)).flatten()
    missing = int((firsts != start[0]).sum())
    if missing:
        _logger.warning(
            "%d of the %d sequences of the first batch do not begin with BOS, as the tokenizer's texts do: thresholds "
            "will be those of a model used without it",
            missing,
            len(firsts),
        )


def leading_tokens(tokenizer: Any) -> list[int]:
    """
    Tell what a tokenizer begins every text with.

    :return: The BOS token, or nothing.
    """
    tokens = tokenizer.encode("a")
    return tokens[:1] if tokens and tokens[0] == tokenizer.bos_token_id else []
