"""One model, one method: thresholds, how much stays active, and what that costs."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from actsparse.algorithms import ZEROS
from actsparse.algorithms.bisection import next_guess
from actsparse.commands.studies.inspection.cett import TailErrors
from actsparse.commands.studies.inspection.networks import (
    CETT,
    FAT,
    TOPK,
    Network,
    find_networks,
    mask_gates,
    mask_outputs,
)
from actsparse.commands.studies.inspection.result import Inspection, Line
from actsparse.errors import ActsparseError
from actsparse.evaluation.comparison import compare_losses
from actsparse.evaluation.sparsity import count_zeros
from actsparse.runtime.environment import peak_memory
from actsparse.runtime.progress import Say, progress_bar
from actsparse.sparsify import sparsify_activations
from actsparse.sparsity_report import SparsityReport
from actsparse.torch.insertion import intercept_inputs, named_sparsifiers
from actsparse.torch.running import evaluation_mode

PPLP = "pplp"
METHODS = (TOPK, FAT, CETT, PPLP, ZEROS)
MAX_EVALUATIONS = 15
# So far may the perplexity ratio stay below the one allowed.
RATIO_TOLERANCE = 0.0005


def inspect_model(
    model: nn.Module,
    tokenizer: Any,
    batches: list[Any],
    pages: Sequence[str],
    *,
    method: str,
    value: float | None,
    line: Line | None = None,
    max_length: int = 512,
    heat_tokens: int = 128,
    say: Say = lambda _line: None,
) -> Inspection:
    """
    Mask the feed-forward networks of a model and see how sparse they are and what that costs.

    :param method: One of `METHODS`.
    :raises ActsparseError: If the model has no such networks, or they do not fit the line.
    """
    run = _Run(model, batches, say)
    kind = line.kind if line else method
    networks = find_networks(model, batches[0], needs_gates=kind in (TOPK, FAT))
    if line is not None and len(line.thresholds) != len(networks):
        msg = f"--thresholds has {len(line.thresholds)} thresholds, but the model has {len(networks)} networks"
        raise ActsparseError(msg)
    errors: TailErrors | None = None
    error, evaluations = value if kind == CETT else None, 0
    with run.timed("dense"):
        dense, _ = run.loss()
    if kind == ZEROS:
        sparsify_activations(model, algorithm=ZEROS)
        masked_layers = dict(named_sparsifiers(model))
        networks = [network for network in networks if network.down.name in masked_layers]
        found = None
    elif kind in (TOPK, FAT):
        values = line.thresholds if line else (value or 0.0,) * len(networks)
        mask_gates(model, networks, kind, values)
        # What counts among the largest differs from token to token: there is no threshold to hand on.
        found = Line(FAT, values) if kind == FAT else None
    else:
        say("measuring output errors")
        with run.timed("errors"):
            errors = TailErrors(model, networks, batches)
        with run.timed("search"):
            if method == PPLP and line is None:
                error, evaluations = _search(run, errors, dense, value or 0.0)
            found = line or Line(CETT, tuple(errors.find(error or 0.0).values()))
            mask_outputs(model, errors.entry_thresholds(found.thresholds))
    with run.timed("calibration"):
        masked, sparsity = run.loss()
    say("comparing on the evaluation text")
    with run.timed("evaluation"):
        compared = compare_losses(model, tokenizer, pages, max_length=max_length)
        heat = _draw_heat(model, tokenizer, networks, pages[0], heat_tokens)
    assert sparsity is not None
    names = tuple(network.down.name for network in networks)
    return Inspection(
        method=kind,
        value=value if line is None else None,
        layers=names,
        line=found,
        activation=_activation(compared.sparsity, names),
        calibration_activation=_activation(sparsity, names),
        errors=tuple(errors.at(found.thresholds)) if errors is not None and found is not None else (),
        calibration_ratio=math.exp(masked - dense),
        ratio=math.exp(compared.loss_increase),
        ratio_interval=tuple(math.exp(end) for end in compared.loss_increase_interval),  # type: ignore[arg-type]
        error=error,
        evaluations=evaluations,
        seconds=run.seconds,
        peak_memory=peak_memory(),
        largest_fall=errors.largest_fall if errors is not None else None,
        heat=heat,
    )


class _Run:
    """A model with its calibration data and a clock."""

    def __init__(self, model: nn.Module, batches: list[Any], say: Say) -> None:
        self.model = model
        self.say = say
        self.seconds: dict[str, float] = {}
        self._batches = batches

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def loss(self) -> tuple[float, SparsityReport | None]:
        """Compute the mean next-token loss on the calibration data, and how sparse the masks are there."""
        total, tokens = 0.0, 0
        is_masked = next(named_sparsifiers(self.model), None) is not None
        bar = progress_bar("measuring the loss", total=len(self._batches), unit="batches")
        with bar as advance, evaluation_mode(self.model), torch.no_grad(), count_zeros(self.model) as counter:
            for batch in self._batches:
                logits = self.model(**batch).logits[:, :-1].flatten(0, 1).float()
                labels = batch["input_ids"][:, 1:].flatten()
                total += float(F.cross_entropy(logits, labels, reduction="sum").double())
                tokens += labels.numel()
                advance(1)
            report = counter.report() if is_masked else None
        return total / tokens, report


def _search(run: _Run, errors: TailErrors, dense: float, growth: float) -> tuple[float, int]:
    """Find the largest error for all layers at which perplexity grows by so many percent at most, in sample."""
    limit = math.log1p(growth / 100)
    low, high = 0.0, 1.0
    below = above = None
    for evaluation in range(1, MAX_EVALUATIONS + 1):
        error = next_guess(low, high, below, above, limit)
        mask_outputs(run.model, errors.entry_thresholds(list(errors.find(error).values())))
        loss = run.loss()[0] - dense
        run.say(f"CETT {error:.4f}: perplexity {100 * math.expm1(loss):+.3f}%")
        if loss > limit:
            high, above = error, (error, loss)
            continue
        low, below = error, (error, loss)
        if math.exp(limit) - math.exp(loss) <= RATIO_TOLERANCE:
            return low, evaluation
    return low, MAX_EVALUATIONS


def _activation(report: SparsityReport, names: Sequence[str]) -> tuple[float, ...]:
    sparsity = {layer.name: layer.sparsity for layer in report.layers}
    return tuple(1 - sparsity[name] for name in names)


def _draw_heat(
    model: nn.Module, tokenizer: Any, networks: list[Network], page: str, tokens: int
) -> tuple[list[list[float]], list[str]]:
    ids = tokenizer.encode(page, add_special_tokens=True, verbose=False)[:tokens]
    rows: dict[str, list[float]] = {}

    def see(name: str, x: torch.Tensor) -> torch.Tensor:
        rows[name] = (x != 0).float().mean(-1).flatten().tolist()
        return x

    names = [network.down.name for network in networks]
    # The masks of down projections run before what is seen here.
    with evaluation_mode(model), torch.no_grad(), intercept_inputs(model, names, see):
        model(input_ids=torch.tensor([ids]))
    return [rows[name] for name in names], [tokenizer.decode([token]) for token in ids]
