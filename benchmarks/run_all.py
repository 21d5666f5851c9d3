"""
Run the benchmarks and the demo one after the other, keep their results, and rewrite the README files' tables.

    python benchmarks/run_all.py [--only NAME ...] [--table]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bars import Bar
from rich.console import Console

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
BENCHMARKS = (
    "parity",
    "calibration_time",
    "calibration_memory",
    "mask_cost",
    "target_met",
    "decode_speed",
    "kernel_speed",
    "openvino_numbers",
    "frontier",
    "recovery",
)
DEMO = "demo"
FRONT_PAGE = FOLDER.parent / "README.md"


def run(name: str) -> int:
    """
    Run one benchmark in a process of its own.

    :param name: The benchmark.
    :return: Its exit code.
    """
    Console(stderr=True).rule(name)
    if name == DEMO:
        return run_demo()
    path = (RESULTS / f"{name}.json").relative_to(FOLDER.parent)
    command = [sys.executable, f"benchmarks/{name}.py", "--json", str(path)]
    return subprocess.run(command, cwd=FOLDER.parent).returncode


def run_demo() -> int:
    """
    Run `actsparse demo` and keep its report.

    :return: Its exit code.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = subprocess.run(
            [sys.executable, "-m", "actsparse", "demo", "--out", folder], cwd=FOLDER.parent
        ).returncode
        if code == 0:
            for suffix in (".json", ".md"):
                shutil.copyfile(Path(folder) / f"report{suffix}", RESULTS / f"{DEMO}{suffix}")
    return code


def make_table(reports: Sequence[dict[str, Any]], *, has_notes: bool) -> str:
    """
    Turn results into a table of their bars.

    :param reports: The JSON files' contents.
    :param has_notes: Whether the table has a column for notes.
    :return: Markdown.
    """
    headings = ("benchmark", "figure", "bar", "measured", "result", "note")[: 6 if has_notes else 5]
    lines = [headings, ("---",) * len(headings)]
    for report in reports:
        for entry in report["bars"]:
            bar = Bar(**{name: value for name, value in entry.items() if name != "is_met"})
            if bar.limit is not None:
                lines.append((report["benchmark"], *bar.cells)[: len(headings)])
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


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


def write_tables() -> None:
    """Rewrite the generated parts of both README files from the results that there are."""
    paths = [RESULTS / f"{name}.json" for name in BENCHMARKS]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    origins = "\n".join(f"- {describe_origin(report)}" for report in reports)
    replace_part(README, "results", f"{make_table(reports, has_notes=True)}\n\n{origins}")
    replace_part(FRONT_PAGE, "results", make_table(reports, has_notes=False))
    demo = RESULTS / f"{DEMO}.md"
    if demo.is_file():
        _, _, table = demo.read_text(encoding="utf-8").partition("\n\n")
        replace_part(FRONT_PAGE, DEMO, table.strip())


def replace_part(path: Path, name: str, contents: str) -> None:
    """
    Replace what stands between two markers of a Markdown file.

    :param path: The file.
    :param name: The markers' name.
    :param contents: What shall stand there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{contents}\n\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmarks.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: the highest of the benchmarks'.
    """
    parser = argparse.ArgumentParser(description="Run the benchmarks and rewrite the README files' tables.")
    names = (*BENCHMARKS, DEMO)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these alone")
    parser.add_argument("--table", action="store_true", help="run nothing, only rewrite the tables")
    options = parser.parse_args(arguments)
    RESULTS.mkdir(exist_ok=True)
    codes = [] if options.table else [run(name) for name in options.only]
    write_tables()
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
