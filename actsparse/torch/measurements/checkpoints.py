"""Backward passes that keep one block's activations at a time, and compute the others again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# Batches of more tokens are run with checkpoints: up to there, what a backward pass keeps is less than the weights of
# all but the smallest models, and computing it twice would be a third more work.
LARGE_BATCH = 2048


def is_large(batch: Any) -> bool:
    """
    Tell whether what a backward pass of a batch would keep is worth computing twice.

    :return: Whether it has more than `LARGE_BATCH` tokens.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids is not None and ids.numel() > LARGE_BATCH


@contextmanager
def checkpoint_blocks(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """
    Run each block's forward a second time when its gradients are wanted, instead of keeping its activations.

    The first forward runs without gradients: whoever watches a block counts only where gradients are enabled.

    :param blocks: Modules that take the hidden states as their first argument.
    :return: A context in which that happens. Caches of keys and values must be off in it: they would be filled twice.
    """
    # An attribute of the instance goes before its class's method; other libraries may have put one there.
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block, _ in before:
            block.forward = partial(_run_with_checkpoint, block.forward)
        yield
    finally:
        for block, forward in before:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _run_with_checkpoint(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not args or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Keyword arguments go past the checkpoint; the first block's input has no gradient of its own.
    hidden, *others = args
    hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()

    def run(hidden: torch.Tensor) -> Any:
        return forward(hidden, *others, **kwargs)

    return checkpoint(run, hidden, use_reentrant=True, preserve_rng_state=False)
