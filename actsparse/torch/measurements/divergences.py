"""How far the predictions move when a model is masked in one way or another."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from actsparse.algorithms import Movement, Trials
from actsparse.calibration import run_each
from actsparse.runtime import distributed
from actsparse.torch.blockwise import run_blockwise
from actsparse.torch.logits import split_tokens
from actsparse.torch.measurements.masks import SequenceMasks
from actsparse.torch.measurements.probe import NO_TOKEN, Probe
from actsparse.torch.running import evaluation_mode, run_model

Measure = Callable[[Any], Movement]
# Which masks are on: runs of an offloaded model are side by side, each in a context of its own.
_masks: ContextVar[SequenceMasks | None] = ContextVar("masks", default=None)


def measure_divergences(
    probe: Probe,
    trials: Trials,
    importance: Mapping[str, torch.Tensor],
    batches: Sequence[Any],
) -> list[list[Movement]]:
    """
    Run each batch without masks, and then masked in several ways, each sequence at its own quantiles.

    :param trials: For each batch the ways to mask it: the sparsity of each layer.
    :return: For each batch and way how far the predictions move. For a model without logits how far the caller's loss
        does.
    :raises ActsparseError: If the model gives no logits, and there is no loss.
    """
    found = [torch.zeros(len(row), 2, dtype=torch.float64) for row in trials]

    def intercept(name: str, x: torch.Tensor) -> torch.Tensor:
        masks = _masks.get()
        return x if masks is None else masks.mask(name, x)

    def run(number: int, batch: Any) -> None:
        dense: list[Measure] = []

        def run_dense() -> None:
            dense.append(measure_from(probe, batch, run_model(probe.model, batch)))

        def run_masked(column: int, sparsity: Mapping[str, float]) -> None:
            token = _masks.set(SequenceMasks(probe, sparsity, importance))
            try:
                output = run_model(probe.model, batch)
            finally:
                _masks.reset(token)
            found[number][column] = torch.tensor(dense[0](output))

        jobs = [partial(run_masked, column, sparsity) for column, sparsity in enumerate(trials[number])]
        # The dense run begins first, and so ends first.
        run_blockwise(probe.model, [run_dense, *jobs])

    numbers = iter(distributed.share(range(len(batches))))
    own = distributed.share(batches)
    with evaluation_mode(probe.model), torch.no_grad(), probe.watch(intercept):
        run_each(lambda batch: run(next(numbers), batch), own, total=len(own), description="comparing masks")
    distributed.add_up(*found)
    return [[Movement(*way) for way in row.tolist()] for row in found]


def measure_from(probe: Probe, batch: Any, output: Any) -> Measure:
    """
    Remember what a model gave.

    :return: What tells how far another output of the model is from this one.
    """
    if getattr(output, "logits", None) is None and probe.loss is not None:
        loss = float(probe.loss(output, batch))

        def measure_loss(other: Any) -> Movement:
            moved = float(probe.loss(other, batch)) - loss  # type: ignore[misc]
            return Movement(abs(moved), moved)

        return measure_loss
    logits = probe.read_logits(output).flatten(0, -2)
    labels = _read_labels(probe, batch, len(logits)).to(logits.device)
    probabilities = torch.empty_like(logits, dtype=torch.float32)
    negative_entropy = likelihood = 0.0
    for rows, p, following in split_tokens(logits, probabilities, labels):
        expected = rows.float().log_softmax(-1)
        torch.exp(expected, out=p)
        negative_entropy += float(torch.linalg.vecdot(p, expected).sum(dtype=torch.float64))
        likelihood -= _sum_losses(expected, following)

    def measure(other: Any) -> Movement:
        divergence, loss = negative_entropy, likelihood
        for rows, p, following in split_tokens(probe.read_logits(other).flatten(0, -2), probabilities, labels):
            found = rows.float().log_softmax(-1)
            divergence -= float(torch.linalg.vecdot(p, found).sum(dtype=torch.float64))
            loss += _sum_losses(found, following)
        count = int((labels != NO_TOKEN).sum())
        return Movement(max(divergence, 0.0) / len(labels), loss / count if count else math.nan)

    return measure


def _read_labels(probe: Probe, batch: Any, tokens: int) -> torch.Tensor:
    labels = probe.read_next_tokens(batch)
    if labels is None or labels.numel() != tokens:  # as where a decoder predicts something else than the input
        return torch.full((tokens,), NO_TOKEN)
    return labels.flatten()


def _sum_losses(log_probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return float(F.nll_loss(log_probabilities, labels, reduction="sum", ignore_index=NO_TOKEN))
