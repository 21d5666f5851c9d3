"""
Run the benchmarks one after the other, keep their JSON files, and rewrite the table of results in README.md.

    python benchmarks/run_all.py [--only NAME ...] [--table]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Bar
from rich.console import Console

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
BENCHMARKS = ("parity", "calibration_time", "calibration_memory", "mask_cost", "target_met")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def run(name: str) -> int:
    """
    Run one benchmark in a process of its own.

    :param name: The benchmark.
    :return: Its exit code.
    """
    Console(stderr=True).rule(name)
    path = (RESULTS / f"{name}.json").relative_to(FOLDER.parent)
    command = [sys.executable, f"benchmarks/{name}.py", "--json", str(path)]
    return subprocess.run(command, cwd=FOLDER.parent).returncode


def make_markdown(reports: Sequence[dict[str, Any]]) -> str:
    """
    Turn results into a table of their bars, and a line for each on where its numbers come from.

    :param reports: The JSON files' contents.
    :return: Markdown.
    """
    lines = ["| benchmark | figure | bar | measured | result | note |", "| --- | --- | --- | --- | --- | --- |"]
    for report in reports:
        for entry in report["bars"]:
            bar = Bar(**{name: value for name, value in entry.items() if name != "is_met"})
            if bar.limit is not None:
                lines.append(f"| {' | '.join((report['benchmark'], *bar.cells))} |".replace("|  |", "| |"))
    lines.append("")
    lines += [f"- {describe_origin(report)}" for report in reports]
    return "\n".join(lines)


def describe_origin(report: dict[str, Any]) -> str:
    """
    Say in one line which code ran on which machine.

    :param report: A JSON file's contents.
    :return: Markdown.
    """
    versions, machine, git = report["versions"], report["machine"], report["git"]
    commit = (git["commit"] or "unknown")[:10] + (", changed since" if git["is_dirty"] else "")
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "nncf", "transformers"))
    threads = f"{machine['threads']} of {machine['cores']} cores"
    return f"`{report['command']}`: commit {commit}; {packages}; {machine['processor']}, {threads}"


def write_table() -> None:
    """Rewrite the table in README.md from the JSON files that there are."""
    paths = [RESULTS / f"{name}.json" for name in BENCHMARKS]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{make_markdown(reports)}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmarks.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: the highest of the benchmarks'.
    """
    parser = argparse.ArgumentParser(description="Run the benchmarks and rewrite the table in README.md.")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="run these alone")
    parser.add_argument("--table", action="store_true", help="run nothing, only rewrite the table")
    options = parser.parse_args(arguments)
    RESULTS.mkdir(exist_ok=True)
    codes = [] if options.table else [run(name) for name in options.only]
    write_table()
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
