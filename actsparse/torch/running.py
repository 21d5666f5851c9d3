"""Running batches through a torch model, and leaving it as it was."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from actsparse.calibration import run_each, run_one
from actsparse.runtime.progress import progress_bar
from actsparse.torch.blockwise import run_blockwise
from actsparse.torch.offload import is_offloaded


def run_model(model: nn.Module, batch: Any) -> Any:
    """Run one model input: a dict as keyword arguments, a tuple as positional ones, anything else as the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def run_batches(
    model: nn.Module, batches: Iterable[Any], *, total: int | None, description: str, reads_logits: bool = True
) -> int:
    """
    Run every batch in evaluation mode and without gradients, with a progress bar.

    :param model: The model; its training flags are restored afterwards, whatever happens.
    :param reads_logits: Whether anything depends on the logits. Where nothing does, a causal language model is asked
        for those of the last token only: the head of a small model is a fifth of its work.
    :raises DatasetError: If the model cannot take a batch; names the batch.
    """

    def run(batch: Any) -> None:
        run_model(model, batch if reads_logits else _keep_last_logits(model, batch))

    with evaluation_mode(model), torch.no_grad():
        if not is_offloaded(model):
            return run_each(run, batches, total=total, description=description)
        with progress_bar(description, total=total, unit="batches") as advance:
            jobs = [partial(run_one, run, batch, number, advance) for number, batch in enumerate(batches)]
            return len(run_blockwise(model, jobs))


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """
    Put a model in evaluation mode for a while.

    :param model: The model; anything that is not a torch module has no mode.
    :return: A context after which each module's training flag is what it was.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _keep_last_logits(model: nn.Module, batch: Any) -> Any:
    is_known = "logits_to_keep" in inspect.signature(model.forward).parameters
    if is_known and isinstance(batch, Mapping) and not {"labels", "logits_to_keep"} & batch.keys():
        return {**batch, "logits_to_keep": 1}
    return batch
