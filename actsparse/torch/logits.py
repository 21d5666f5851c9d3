"""Predictions over a vocabulary, a few tokens at a time."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

# As fp32 4 MB: such pieces stay in the cache and in the same memory. 256 tokens of a 262,144-word vocabulary at once
# take five times as long, most of it for pages that the system gives out and takes back.
_PIECE = 1 << 20


def split_tokens(logits: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """
    Split predictions, and what belongs to them, into pieces of few tokens.

    :param logits: Predictions, [tokens, vocabulary].
    :param others: Tensors that have one row for each token too.
    :return: For each piece its rows of all of them.
    """
    tensors = (logits, *others)
    return zip(*(tensor.split(max(_PIECE // logits.shape[-1], 1)) for tensor in tensors), strict=True)


def sum_losses(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """
    Sum up what tokens cost.

    :param logits: Predictions, [tokens, vocabulary].
    :param targets: The tokens, [tokens].
    :return: Their negative log-likelihood in nats.
    """
    pieces = split_tokens(logits, targets)
    return math.fsum(float(F.cross_entropy(rows.float(), labels, reduction="sum")) for rows, labels in pieces)
