"""One model, one method: thresholds, how much stays active, and what that costs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn

from actsparse.bisection import next_guess
from actsparse.calibration import evaluation_mode
from actsparse.environment import peak_memory
from actsparse.errors import ActsparseError
from actsparse.evaluation.comparison import compare_losses
from actsparse.evaluation.sparsity import SparsityReport, count_zeros
from actsparse.insertion import intercept_inputs, named_sparsifiers
from actsparse.progress import progress_bar
from actsparse.report import percent
from actsparse.studies.inspection.cett import TailErrors
from actsparse.studies.inspection.networks import (
    CETT,
    FAT,
    TOPK,
    Network,
    find_networks,
    mask_gates,
    mask_outputs,
)

PPLP = "pplp"
METHODS = (TOPK, FAT, CETT, PPLP)
MAX_EVALUATIONS = 15
# So far may the perplexity ratio stay below the one allowed.
RATIO_TOLERANCE = 0.0005

Say = Callable[[str], None]


class Line(NamedTuple):
    """Thresholds of every network, as printed by one run and read by the next."""

    kind: str
    thresholds: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.kind}:" + ",".join(f"{threshold:.6g}" for threshold in self.thresholds)

    @classmethod
    def parse(cls, text: str) -> "Line":
        """
        Read a line.

        :param text: ``cett:`` or ``fat:`` and numbers between commas.
        :return: The thresholds.
        :raises ActsparseError: If it is no such line.
        """
        kind, _, numbers = text.partition(":")
        try:
            thresholds = tuple(float(number) for number in numbers.split(","))
            if kind not in (CETT, FAT) or not all(0 <= threshold < math.inf for threshold in thresholds):
                raise ValueError
        except ValueError:
            msg = f"--thresholds takes a line that inspect printed, such as cett:0.012,0.034, not {text[:60]!r}"
            raise ActsparseError(msg) from None
        return cls(kind, thresholds)


@dataclass(frozen=True)
class Inspection:
    """
    How sparse a model's feed-forward networks are.

    :param method: One of `METHODS`, or the kind of line that was given.
    :param value: What the method was given; None with a line.
    :param layers: The down projections, in order.
    :param line: Thresholds that a later run accepts; None for a method that has none.
    :param activation: The share of entries that stay active on the evaluation text, by layer.
    :param calibration_activation: The same on the calibration text.
    :param errors: CETT on the calibration text by layer; empty for methods that do not look at it.
    :param calibration_ratio: Perplexity with masks over without, on the calibration text: in sample.
    :param ratio: The same on the evaluation text: held out.
    :param ratio_interval: Its 95% interval over windows.
    :param error: The error allowed to every layer, where the method finds one.
    :param evaluations: How many errors the search tried.
    :param seconds: How long each part took.
    :param peak_memory: Of the process so far, bytes.
    :param heat: The share of active entries, [layers, tokens], and the tokens, for a window of the evaluation text.
    :param largest_fall: By how much an error ever falls when a threshold rises: 0 where CETT is monotone.
    """

    method: str
    value: float | None
    layers: tuple[str, ...]
    line: Line | None
    activation: tuple[float, ...]
    calibration_activation: tuple[float, ...]
    errors: tuple[float, ...]
    calibration_ratio: float
    ratio: float
    ratio_interval: tuple[float, float]
    error: float | None
    evaluations: int
    seconds: dict[str, float]
    peak_memory: int
    largest_fall: float | None
    heat: tuple[list[list[float]], list[str]] = field(default=([], []), repr=False)

    @property
    def mean_activation(self) -> float:
        """The share of entries that stay active, mean over layers, on the evaluation text."""
        return float(np.mean(self.activation))

    def to_table(self, settings: Mapping[str, Any]) -> Table:
        """
        Draw the inspection for a terminal.

        :param settings: How it was made.
        :return: A rich table.
        """
        caption = "\n".join(f"{name}: {value}" for name, value in settings.items())
        table = Table(title="Active entries of feed-forward networks", caption=caption, caption_justify="left")
        for column in ("layer", "threshold", "CETT", "active, calibration", "active, evaluation"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for i, name in enumerate(self.layers):
            threshold = f"{self.line.thresholds[i]:.4g}" if self.line else "–"
            error = f"{self.errors[i]:.4f}" if self.errors else "–"
            table.add_row(name, threshold, error, percent(self.calibration_activation[i]), percent(self.activation[i]))
        table.add_section()
        mean = percent(float(np.mean(self.calibration_activation)))
        table.add_row("mean over layers", "", "", mean, percent(self.mean_activation))
        low, high = self.ratio_interval
        held_out = f"{self.ratio:.4f} ({low:.4f} – {high:.4f})"
        table.add_row("perplexity over dense", "", "", f"{self.calibration_ratio:.4f}", held_out)
        return table

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the inspection into what JSON can hold.

        :return: All of it but the heat map.
        """
        return {
            "method": self.method,
            "value": self.value,
            "mean_activation": self.mean_activation,
            "perplexity_ratio": self.ratio,
            "perplexity_ratio_interval": list(self.ratio_interval),
            "calibration_perplexity_ratio": self.calibration_ratio,
            "calibration_mean_activation": float(np.mean(self.calibration_activation)),
            "thresholds": str(self.line) if self.line else None,
            "cett": self.error,
            "evaluations": self.evaluations,
            "cett_largest_fall": self.largest_fall,
            "layers": [
                {"name": name, "activation": active, "calibration_activation": before, "cett": error}
                for name, active, before, error in zip(
                    self.layers,
                    self.activation,
                    self.calibration_activation,
                    self.errors or [None] * len(self.layers),
                    strict=True,
                )
            ],
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory,
        }


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

    :param model: The causal language model; masked afterwards.
    :param tokenizer: Its tokenizer.
    :param batches: The calibration data: windows of tokens, on which thresholds are found.
    :param pages: The evaluation text, which they are not found on.
    :param method: One of `METHODS`.
    :param value: What it is given.
    :param line: Thresholds to take instead of a method and a value.
    :param max_length: The evaluation window in tokens.
    :param heat_tokens: How many tokens of the evaluation text the heat map shows.
    :param say: Told what happens next.
    :return: What was found.
    :raises ActsparseError: If the model has no such networks, or they do not fit the line.
    """
    run = _Run(model, batches, say)
    kind = line.kind if line else method
    networks = find_networks(model, batches[0], needs_gates=kind in (TOPK, FAT))
    if line is not None and len(line.thresholds) != len(networks):
        msg = f"--thresholds has {len(line.thresholds)} thresholds, but the model has {len(networks)} networks"
        raise ActsparseError(msg)
    names = tuple(network.down.name for network in networks)
    errors: TailErrors | None = None
    error: float | None = None
    found: Line | None = line
    with run.timed("dense"):
        dense, _ = run.loss()
    if kind in (TOPK, FAT):
        values = line.thresholds if line else (value or 0.0,) * len(networks)
        mask_gates(model, networks, kind, values)
        # What counts among the largest differs from token to token: there is no threshold to hand on.
        found = Line(FAT, values) if kind == FAT else None
    else:
        say("measuring output errors")
        with run.timed("errors"):
            errors = TailErrors(model, networks, batches)
        with run.timed("search"):
            if line is None:
                error = value if kind == CETT else _search(run, errors, dense, value or 0.0)
            found = line or Line(CETT, tuple(errors.find(error or 0.0).values()))
            mask_outputs(model, errors.entry_thresholds(found.thresholds))
    with run.timed("calibration"):
        masked, sparsity = run.loss()
    say("comparing on the evaluation text")
    with run.timed("evaluation"):
        compared = compare_losses(model, tokenizer, pages, max_length=max_length)
        heat = _draw_heat(model, tokenizer, networks, pages[0], heat_tokens)
    assert sparsity is not None
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
        evaluations=run.evaluations,
        seconds=run.seconds,
        peak_memory=peak_memory(),
        largest_fall=errors.largest_fall if errors is not None else None,
        heat=heat,
    )


class _Run:
    """
    A model with its calibration data and a clock.

    :param model: The model.
    :param batches: The data.
    :param say: Told what happens next.
    """

    def __init__(self, model: nn.Module, batches: list[Any], say: Say) -> None:
        self.model = model
        self.say = say
        self.seconds: dict[str, float] = {}
        self.evaluations = 0
        self._batches = batches

    @contextmanager
    def timed(self, name: str) -> Any:
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


def _search(run: _Run, errors: TailErrors, dense: float, growth: float) -> float:
    """Find the largest error for all layers at which perplexity grows by so many percent at most, in sample."""
    limit = math.log1p(growth / 100)
    low, high = 0.0, 1.0
    below = above = None
    while run.evaluations < MAX_EVALUATIONS:
        error = next_guess(low, high, below, above, limit)
        mask_outputs(run.model, errors.entry_thresholds(list(errors.find(error).values())))
        loss = run.loss()[0] - dense
        run.evaluations += 1
        run.say(f"CETT {error:.4f}: perplexity {100 * math.expm1(loss):+.3f}%")
        if loss <= limit:
            low, below = error, (error, loss)
            if math.exp(limit) - math.exp(loss) <= RATIO_TOLERANCE:
                break
        else:
            high, above = error, (error, loss)
    return low


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
