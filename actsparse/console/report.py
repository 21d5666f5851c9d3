"""Reports: the same rows as a table, as Markdown and as JSON."""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from actsparse.algorithms import Selection
from actsparse.evaluation.cost import Cost
from actsparse.runtime.environment import describe_environment
from actsparse.runtime.process import explain_output_errors
from actsparse.sparsity_report import SparsityReport
from actsparse.storage.files import write_bytes

COLUMNS = (
    "model",
    "sparsity",
    "weight reads skipped",
    "word perplexity",
    "token perplexity",
    "calibration, s",
    "evaluation, s",
)


@dataclass(frozen=True)
class Row:
    """
    One line of a report.

    :param calibration_seconds: How long its call of `sparsify_activations` took; None without one.
    """

    name: str
    cost: Cost
    calibration_seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """
        Format the row.

        :return: A text for each of `COLUMNS`.
        """
        sparsity, perplexity = self.cost.sparsity, self.cost.perplexity
        return (
            self.name,
            percent(sparsity.sparsity) if sparsity else "–",
            percent(sparsity.weight_reads_skipped) if sparsity else "–",
            f"{perplexity.word_perplexity:.3f}",
            f"{perplexity.token_perplexity:.3f}",
            "–" if self.calibration_seconds is None else f"{self.calibration_seconds:.1f}",
            f"{self.cost.seconds:.1f}",
        )


@dataclass(frozen=True)
class Report:
    """
    Rows measured on one text.

    :param settings: How they were measured: model, texts, context length, tokens masked.
    """

    title: str
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def to_table(self) -> Table:
        """Draw the report for a terminal."""
        table = Table(title=escape(self.title), caption=make_caption(self.settings), caption_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in self.rows:
            table.add_row(*row.cells())
        return table

    def to_markdown(self) -> str:
        """Write the report as Markdown."""
        return f"# {self.title}\n\n" + table_markdown(COLUMNS, [row.cells() for row in self.rows], self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Turn the report into what JSON can hold."""
        rows = [
            {"name": r.name, "calibration_seconds": r.calibration_seconds, **r.cost.to_dict()} for r in self.rows
        ]  # fmt: skip
        return {"title": self.title, "settings": self.settings, "rows": rows, "environment": describe_environment()}


def sparsity_table(sparsity: SparsityReport, title: str) -> Table:
    """Draw measured sparsity by role."""
    table = Table(title=title)
    for column in ("role", "layers", "target", "allocated", "measured"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, measured in sparsity.by_role.items():
        layers = [x for x in sparsity.layers if ("+".join(x.roles) or "other") == role]
        target, allocated = _span(x.target_sparsity for x in layers), _span(x.allocated_sparsity for x in layers)
        table.add_row(role, str(len(layers)), target, allocated, percent(measured))
    table.add_section()
    table.add_row("all, by weight bytes", str(len(sparsity.layers)), "", "", percent(sparsity.sparsity))
    table.add_row("share of all weight reads skipped", "", "", "", percent(sparsity.weight_reads_skipped))
    return table


def _span(shares: Iterable[float | None]) -> str:
    known = sorted(share for share in shares if share is not None)
    return " – ".join(dict.fromkeys(percent(share) for share in (*known[:1], *known[-1:]))) or "–"


def selection_table(selection: Selection) -> Table:
    """Draw what an algorithm that chooses has tried."""
    table = Table(title=f"Tried on {selection.held_out} calibration batches held out")
    table.add_column("algorithm")
    table.add_column("divergence from dense, nats a token", justify="right")
    if selection.losses:
        table.add_column("Δ loss of the text", justify="right")
    for name, divergence in selection.divergences.items():
        is_chosen = name == selection.chosen
        loss = [f"{selection.losses[name]:+.4f}"] if selection.losses else []
        title = f"{name} (chosen)" if is_chosen else name
        table.add_row(title, f"{divergence:.4f}", *loss, style="bold" if is_chosen else "")
    return table


def acceleration_table(acceleration: Any) -> Table:
    """
    Draw which layers the kernel runs.

    :param acceleration: What `actsparse.openvino.accelerate` did.
    """
    table = Table(title="Accelerated OpenVINO model")
    table.add_column("operation")
    table.add_column("operations", justify="right")
    table.add_column("layers", justify="right")
    for name, is_masked in sorted({(site.operation, site.is_masked) for site in acceleration.accelerated}):
        sites = [s for s in acceleration.accelerated if (s.operation, s.is_masked) == (name, is_masked)]
        title = name if is_masked else f"{name}, without a mask"
        table.add_row(title, str(len(sites)), str(sum(len(site.layers) for site in sites)))
    for reason in dict.fromkeys(site.reason for site in acceleration.kept):
        sites = [site for site in acceleration.kept if site.reason == reason]
        table.add_row(f"not accelerated: {reason}", str(len(sites)), str(sum(len(site.layers) for site in sites)))
    return table


def table_markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], settings: Mapping[str, Any]) -> str:
    """Write a table as Markdown, its first column on the left, the others on the right, and its settings below."""
    table = [columns, ("---", *("---:",) * (len(columns) - 1)), *rows]
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return "\n".join([*lines, "", *(f"- {name}: {value}" for name, value in settings.items())]) + "\n"


def make_caption(settings: Mapping[str, Any]) -> str:
    """
    Write settings below a table.

    :return: A line for each, as rich takes it: square brackets are brackets.
    """
    return escape("\n".join(f"{name}: {value}" for name, value in settings.items()))


def read_json(path: Path) -> Any:
    """
    Read a JSON file that an earlier run may have written.

    :return: What it holds; None where it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def to_json(contents: Mapping[str, Any], *, is_ascii: bool = False) -> str:
    """
    Write as JSON, which has no NaN and no infinity: they become null.

    :param is_ascii: Whether to escape all other characters, for an output that may not take them.
    """
    return json.dumps(_finite(contents), indent=2, ensure_ascii=is_ascii, allow_nan=False) + "\n"


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
    """
    Write a JSON file, whole or not at all.

    :param contents: What it shall hold; NaN and infinity become null.
    :raises OutputError: If it cannot be written.
    """
    write_bytes(path, to_json(contents).encode())


def print_result(result: Table | str, file: TextIO | None = None) -> None:
    """Print a table, as wide as it needs to be where it does not go to a terminal, or a line."""
    stream: TextIO = sys.stdout if file is None else file
    with explain_output_errors():
        if isinstance(result, str):
            print(result, file=stream, flush=True)
            return
        console = Console(file=stream) if stream.isatty() else Console(file=stream, width=140)
        console.print(result)


def percent(share: float) -> str:
    """
    Format a share.

    :param share: Between 0 and 1.
    :return: Such as ``37.5%``.
    """
    return f"{100 * share:.1f}%"


def _finite(contents: Any) -> Any:
    if isinstance(contents, Mapping):
        return {key: _finite(value) for key, value in contents.items()}
    if isinstance(contents, list | tuple):
        return [_finite(value) for value in contents]
    return None if isinstance(contents, float) and not math.isfinite(contents) else contents
