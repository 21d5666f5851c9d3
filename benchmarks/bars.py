"""A benchmark's result: bars and whether they are met, as a table and as JSON with where the numbers come from."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

PACKAGES = ("actsparse", "torch", "nncf", "openvino", "transformers")
ROOT = Path(__file__).resolve().parent.parent
# What the benchmarks write themselves does not make the code that they measure another one.
_WRITTEN = (":(exclude)benchmarks/results", ":(exclude)benchmarks/README.md")


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


def describe_run(name: str, command: str, measurement: Measurement) -> dict[str, Any]:
    """
    Put together all that the JSON file records.

    :param name: The benchmark's name.
    :param command: The command that ran it.
    :param measurement: What it measured.
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
        "git": read_git_state(),
        "machine": describe_machine(),
        "samples": measurement.samples,
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """
    Write a report.

    :param path: The file.
    :param contents: What it shall hold.
    """
    path.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """
    Describe the machine that the benchmark runs on.

    :return: Processor, cores, threads, memory, operating system and the load of the last minute.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def read_git_state() -> dict[str, Any]:
    """
    Tell which code was measured.

    :return: The commit, and whether the working tree differs from it; both None outside a checkout.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", *_WRITTEN)
    return {"commit": commit, "is_dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    # Without optional locks, so that asking never gets into the way of anyone who commits.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # Run from a checkout that is on the path without being installed; the commit says which code it is.
        return None


def _with_unit(value: float, unit: str) -> str:
    number = f"{value:.2f}" if 0.1 <= abs(value) < 10 else f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}"
    return f"{number}{'' if unit == '×' else ' '}{unit}".strip()
