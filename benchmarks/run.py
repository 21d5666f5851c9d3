"""
Run benchmarks and regression cases one after the other, each in a process of its own, and keep their results.

    python benchmarks/run.py [NAME | benchmarks/cases/CASE.yaml ...]

`python benchmarks/report.py` builds the tables of them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bars import ROOT, read_git_state, write_json
from rich.console import Console

from actsparse.errors import ActsparseError
from actsparse.regression.case import read_case
from actsparse.regression.process import measure_apart

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
CASE_RESULTS = RESULTS / "cases"
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
    "planted_regression",
)
DEMO = "demo"


def run(name: str) -> int:
    """
    Run one benchmark, the demo or a case, and keep its result.

    :param name: The benchmark, or a case's file.
    :return: Its exit code.
    """
    Console(stderr=True).rule(name)
    if name == DEMO:
        return run_demo()
    if name not in BENCHMARKS:
        return run_case(Path(name))
    path = (RESULTS / f"{name}.json").relative_to(ROOT)
    return subprocess.run([sys.executable, f"benchmarks/{name}.py", "--json", str(path)], cwd=ROOT).returncode


def run_demo() -> int:
    """
    Run `actsparse demo` and keep its report.

    :return: Its exit code.
    """
    git = read_git_state()
    with tempfile.TemporaryDirectory() as folder:
        code = subprocess.run([sys.executable, "-m", "actsparse", "demo", "--out", folder], cwd=ROOT).returncode
        if code == 0:
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
            write_json(RESULTS / f"{DEMO}.json", report | {"git": git})
            (RESULTS / f"{DEMO}.md").write_bytes((Path(folder) / "report.md").read_bytes())
    return code


def run_case(path: Path) -> int:
    """
    Measure a regression case and keep its figures.

    :param path: The case's file.
    :return: The exit code: 0, or 2 for a mistake of the user.
    """
    git = read_git_state()
    try:
        result = replace(measure_apart(path), git=git)
    except ActsparseError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    CASE_RESULTS.mkdir(exist_ok=True)
    write_json(CASE_RESULTS / f"{result.name}.json", result.to_dict())
    return 0


def find_cases() -> list[str]:
    """
    List the cases of this folder.

    :return: Their files.
    """
    return [str(path) for path in sorted((FOLDER / "cases").glob("*.yaml"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmarks.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: the highest of the benchmarks'.
    """
    parser = argparse.ArgumentParser(description="Run benchmarks and regression cases, and keep their results.")
    known = (*BENCHMARKS, DEMO)
    parser.add_argument("names", nargs="*", metavar="NAME|CASE", help=f"cases' files, or {', '.join(known)}; or all")
    names = parser.parse_args(arguments).names or [*known, *find_cases()]
    try:
        for name in names:
            if name not in known:
                read_case(name)
    except ActsparseError as error:
        parser.error(str(error))
    RESULTS.mkdir(exist_ok=True)
    return max(run(name) for name in names)


if __name__ == "__main__":
    sys.exit(main())
