"""A benchmark's result: bars and whether they are met, as a table and as JSON with where the numbers come from."""

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from actsparse.runtime import environment

PACKAGES = ("actsparse", "torch", "nncf", "openvino", "transformers")
ROOT = Path(__file__).resolve().parent.parent
# What the benchmarks write themselves does not make the code that they measure another one.
_WRITTEN = tuple(ROOT / name for name in ("benchmarks/results", "README.md", "docs/results.md", "docs/figures"))


@dataclass(frozen=True)
class Bar:
    """
    One figure, and what it has to reach.

    :param name: What was measured.
    :param measured: The figure.
    :param limit: What it has to reach; None for a figure that only stands beside the others.
    :param is_minimum: Whether the figure has to be at least the limit, not at most.
    :param unit: Unit of both.
    :param note: What else to say of it.
    """

    name: str
    measured: float
    limit: float | None = None
    is_minimum: bool = False
    unit: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is reached, NaN never; None where there is no bar."""
        if self.limit is None:
            return None
        return self.measured >= self.limit if self.is_minimum else self.measured <= self.limit

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, bar, measured figure, verdict and note, as tables show them."""
        sign = "≥" if self.is_minimum else "≤"
        limit = "–" if self.limit is None else f"{sign} {_with_unit(self.limit, self.unit)}"
        verdict = {None: "–", True: "pass", False: "fail"}[self.is_met]
        return self.name, limit, _with_unit(self.measured, self.unit), verdict, self.note


@dataclass(frozen=True)
class Measurement:
    """
    What a benchmark measured.

    :param bars: Its figures.
    :param settings: What it was measured on and with.
    :param samples: Every single measurement that the figures are computed from.
    """

    bars: tuple[Bar, ...]
    settings: dict[str, Any]
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        """Whether every bar is reached."""
        return all(bar.is_met is not False for bar in self.bars)


def make_table(title: str, bars: Iterable[Bar]) -> Table:
    """
    Lay figures out beside their bars.

    :param title: The table's title.
    :param bars: The figures.
    :return: The table.
    """
    table = Table(title=title)
    for heading in ("figure", "bar", "measured", "result", "note"):
        table.add_column(heading, justify="left" if heading in ("figure", "note") else "right")
    for bar in bars:
        style = {None: "dim", True: "", False: "bold red"}[bar.is_met]
        table.add_row(*bar.cells, style=style)
    return table


def join_rows(lines: Sequence[tuple[str, ...]]) -> str:
    """
    Write rows as Markdown.

    :param lines: The rows.
    :return: The table.
    """
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def describe_run(name: str, command: str, measurement: Measurement, git_state: dict[str, Any]) -> dict[str, Any]:
    """
    Put together all that the JSON file records.

    :param name: The benchmark's name.
    :param command: The command that ran it.
    :param measurement: What it measured.
    :param git_state: Which code that was.
    :return: The contents of the file.
    """
    bars = [asdict(bar) | {"is_met": bar.is_met} for bar in measurement.bars]
    return {
        "benchmark": name,
        "command": command,
        "is_met": measurement.is_met,
        "bars": bars,
        "settings": measurement.settings,
        "versions": {package: _version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "git": git_state,
        "machine": environment.describe_machine(),
        "samples": measurement.samples,
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """
    Write a report.

    :param path: The file.
    :param contents: What it shall hold.
    """
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_git_state() -> dict[str, Any]:
    """
    Tell which code is measured.

    :return: As `actsparse.runtime.environment.read_git_state`; what the benchmarks write themselves is no change.
    """
    return environment.read_git_state(ROOT, _WRITTEN)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # Run from a checkout that is on the path without being installed; the commit says which code it is.
        return None


def _with_unit(value: float, unit: str) -> str:
    number = f"{value:.2f}" if 0.1 <= abs(value) < 10 else f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}"
    return f"{number}{'' if unit == '×' else ' '}{unit}".strip()
