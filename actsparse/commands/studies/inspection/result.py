"""What an inspection finds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from actsparse.commands.studies.inspection.networks import CETT, FAT
from actsparse.console.plot import make_figure, save_figure
from actsparse.console.report import make_caption, percent
from actsparse.errors import ActsparseError


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
    :param line: Thresholds that a later run accepts; None for a method that has none.
    :param activation: The share of entries that stay active on the evaluation text, by layer.
    :param errors: CETT on the calibration text by layer; empty for methods that do not look at it.
    :param ratio_interval: Its 95% interval over windows.
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
        """Draw the inspection for a terminal."""
        caption = make_caption(settings)
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

    def draw_heat_map(self, title: str, path: Path) -> None:
        """
        Draw the share of active entries of every layer at every token.

        :raises OutputError: If matplotlib is missing or the file cannot be written.
        """
        rows, tokens = self.heat
        figure = make_figure(path, (max(6.0, 0.16 * len(tokens) + 2), max(3.0, 0.14 * len(rows) + 2)))
        panel = figure.subplots()
        image = panel.imshow([[100 * share for share in row] for row in rows], aspect="auto", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=panel, label="active entries, %")
        labels = [token.replace("\n", "↵").strip() or "·" for token in tokens]
        panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        panel.set(title=title, xlabel="token", ylabel="layer")
        save_figure(figure, path)

    def to_dict(self) -> dict[str, Any]:
        """Turn the inspection into what JSON can hold."""
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
