"""What `actsparse attribution` is asked to do."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actsparse.commands.common import CALIBRATION_LENGTH, validate_precision
from actsparse.commands.studies.attribution.masks import ORACLE, STATIC, WHERE, has_form
from actsparse.commands.studies.attribution.metrics import INTEGRATED, METRICS
from actsparse.errors import ActsparseError, nearest, shorten_message


class Line(NamedTuple):
    """One curve: a metric in a mode, on some kinds of units."""

    mode: str
    metric: str
    where: str

    def __str__(self) -> str:
        return "-".join(self)


@dataclass(frozen=True)
class AttributionJob:
    """What `actsparse attribution` is asked to do; see its help."""

    model: str
    out: Path
    questions: str
    metrics: tuple[str, ...] = tuple(METRICS)
    ratios: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    where: str = "both"
    modes: tuple[str, ...] = (ORACLE,)
    number: int | None = None
    ig_steps: int = 20
    max_tokens: int = 32
    batch: int = 8
    prompt: str | None = None
    calibration: str = "default"
    num_batches: int = 8
    dtype: str = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        validate_precision(None, self.dtype)
        _require_device(self.device)
        for option, chosen, known in (
            ("--metrics", self.metrics, tuple(METRICS)),
            ("--mode", self.modes, (ORACLE, STATIC)),
            ("--where", (self.where,), tuple(WHERE)),
        ):
            wrong = next((name for name in chosen if name not in known), None)
            if wrong is not None or not chosen:
                msg = f"{option} takes {', '.join(known)}, not {wrong!r}; nearest: {nearest(str(wrong), known, 1)}"
                raise ActsparseError(msg)
        if not self.lines:
            msg = (
                f"{', '.join(self.metrics)} has no static form: that would take a backward pass for each step and layer"
            )
            raise ActsparseError(msg)
        if not self.ratios or not all(0 <= ratio < 1 for ratio in self.ratios):
            msg = f"--ratios takes shares of at least 0 and less than 1, not {', '.join(map(str, self.ratios))}"
            raise ActsparseError(msg)
        for option, value in (
            ("--ig-steps", self.ig_steps),
            ("--max-tokens", self.max_tokens),
            ("--batch", self.batch),
        ):
            if value < 1:
                msg = f"{option} is {value}; it must be at least 1"
                raise ActsparseError(msg)
        if self.prompt is not None and "{question}" not in self.prompt:
            msg = f"--prompt must say where the question goes, such as 'Q: {{question}} A:', not {self.prompt!r}"
            raise ActsparseError(msg)

    @property
    def lines(self) -> list[Line]:
        """Every curve asked for; a metric without a static form has none in that mode."""
        pairs = product(self.modes, self.metrics)
        return [Line(mode, metric, self.where) for mode, metric in pairs if has_form(mode, metric)]

    def settings(self, line: Line) -> dict[str, Any]:
        """Say how a curve is measured."""
        settings = {
            "model": self.model,
            "weights": self.dtype,
            "generated": f"greedy, up to {self.max_tokens} tokens, all of them masked; the prompt is not",
            "prompt": self.prompt or "the tokenizer's chat template, else 'Question: … Answer:'",
        }
        if line.mode == STATIC:
            settings["calibration text"] = f"{self.calibration}: {self.num_batches} x {CALIBRATION_LENGTH} tokens"
        if line.metric == INTEGRATED:
            settings["steps of integration"] = str(self.ig_steps)
        return settings


def parse_ratios(text: str) -> tuple[float, ...]:
    """
    Read ratios.

    :raises ActsparseError: If it is neither.
    """
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(",") if part.strip())
        first, last, step = map(float, text.split(":"))
        count = int((last - first) / step + 1e-9) + 1
        if not (0 < count <= 1000 and step > 0):
            raise ValueError
        return tuple(round(first + i * step, 9) for i in range(count))
    except (ValueError, ZeroDivisionError, OverflowError):
        msg = f"--ratios takes FIRST:LAST:STEP such as 0:0.9:0.1, or numbers between commas, not {text!r}"
        raise ActsparseError(msg) from None


def _require_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        msg = f"--device {name} cannot be used here: {shorten_message(error, 100)}"
        raise ActsparseError(msg) from None
