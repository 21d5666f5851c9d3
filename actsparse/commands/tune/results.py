"""What `tune` found: as a table, as JSON, and as points of a picture."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from actsparse.commands.tune.candidates import Candidate, Speed
from actsparse.console.report import make_caption

_COLUMNS = ("candidate", "perplexity", "ms a token", "tokens/s", "first token, ms", "")


@dataclass(frozen=True)
class TuneRow:
    """
    A candidate.

    :param loss: How much more a token costs than with the model's own weights, in nats; None where it was not measured.
    :param speed: How fast it is; None where it was not timed.
    """

    candidate: Candidate
    loss: float | None
    speed: Speed | None
    is_chosen: bool

    def cells(self) -> tuple[str, ...]:
        """Format the row: a text for each column."""
        speed = self.speed
        times = (
            ("–", "–", "–")
            if speed is None
            else (f"{speed.decode:.2f} ({speed.precision})", f"{1e3 / speed.decode:.1f}", f"{speed.first:.0f}")
        )
        loss = "–" if self.loss is None else f"{math.expm1(self.loss):+.2%}"
        return (self.candidate.name, loss, *times, "chosen" if self.is_chosen else "")

    def to_dict(self) -> dict[str, Any]:
        """Turn the row into what JSON can hold."""
        loss = None if self.loss is None else math.expm1(self.loss)
        speed = None if self.speed is None else asdict(self.speed)
        return {
            "name": self.candidate.name,
            **asdict(self.candidate),
            "perplexity_increase": loss,
            "speed": speed,
            "is_chosen": self.is_chosen,
        }


@dataclass(frozen=True)
class TuneReport:
    """
    What was tried and chosen.

    :param rows: The candidates, in the order in which they were measured.
    :param confirmed: What the chosen one costs on text that the search has not seen.
    :param reason: Why the search ended.
    :param left_out: What was not tried, and why.
    """

    rows: tuple[TuneRow, ...]
    confirmed: dict[str, Any]
    reason: str
    settings: dict[str, Any]
    left_out: dict[str, str]

    @property
    def chosen(self) -> TuneRow:
        """The row of the candidate that was written."""
        return next(row for row in self.rows if row.is_chosen)

    def to_table(self) -> Table:
        """Draw the report for a terminal."""
        table = Table(title="What was tried", caption=make_caption(self.settings), caption_justify="left")
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="right" if 0 < number < len(_COLUMNS) - 1 else "left")
        for row in self.rows:
            table.add_row(*map(escape, row.cells()))
        return table

    def to_lines(self) -> list[str]:
        """Say what was chosen, what it costs on other text, and why the search ended."""
        low, high = (math.expm1(end) for end in self.confirmed["loss_increase_interval"])
        lines = [f"{name} was left out: {why}" for name, why in self.left_out.items()]
        lines.append(f"the search ended: {self.reason}")
        lines.append(
            f"{self.chosen.candidate.name} was written; on {self.confirmed['text']} it costs "
            f"{self.confirmed['perplexity_increase']:+.2%} (95%: {low:+.2%} to {high:+.2%})"
        )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Turn the report into what JSON can hold."""
        return {
            "settings": self.settings,
            "chosen": self.chosen.to_dict(),
            "confirmed": self.confirmed,
            "reason": self.reason,
            "left_out": self.left_out,
            "candidates": [row.to_dict() for row in self.rows],
        }

    def points(self) -> list[dict[str, Any]]:
        """Return the candidates whose loss and speed are both known, for `plot_tradeoff`."""
        return [
            {
                "group": row.candidate.weights,
                "name": row.candidate.name,
                "perplexity_increase": math.expm1(row.loss),
                "tokens_per_second": 1e3 / row.speed.decode,
                "is_chosen": row.is_chosen,
            }
            for row in self.rows
            if row.loss is not None and row.speed is not None
        ]
