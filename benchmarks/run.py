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
from pathlib import Path

from bars import ROOT, read_git_state, write_json
from rich.console import Console

from actsparse.commands.regression.case import Case, read_case
from actsparse.commands.regression.job import measure_apart
from actsparse.errors import ActsparseError, SourceError

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
CASE_RESULTS = RESULTS / "cases"
CASES = FOLDER / "cases"
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
    "larger_than_memory",
    "cost_curves",
)
# By name only: they take half an hour and more, several environments, or another program's source and cmake.
LONG = ("peers", "pareto", "kill", "fuzz", "dependency_ranges")
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
    if name not in (*BENCHMARKS, *LONG):
        return run_case(Path(name))
    path = (RESULTS / f"{name}.json").relative_to(ROOT)
    return run_program(f"benchmarks/{name}.py", "--json", str(path))


def run_program(*arguments: str) -> int:
    """
    Run a Python program in a process of its own.

    :param arguments: What python is given.
    :return: Its exit code; as shells say it, where a signal ended the process.
    """
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    return code if code >= 0 else 128 - code


def run_demo() -> int:
    """
    Run `actsparse demo` and keep its report.

    :return: Its exit code.
    """
    git = read_git_state()
    with tempfile.TemporaryDirectory() as folder:
        code = run_program("-m", "actsparse", "demo", "--out", folder)
        if code == 0:
            report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
            write_json(RESULTS / f"{DEMO}.json", report | {"git": git})
            (RESULTS / f"{DEMO}.md").write_bytes((Path(folder) / "report.md").read_bytes())
    return code


def run_case(path: Path) -> int:
    """
    Measure a regression case and keep its figures.

    :param path: The case's file.
    :return: The exit code: 0, 2 for a mistake of the user, or 70 where the process that measured ended early.
    """
    try:
        result = measure_apart(path, read_git_state())
    except (ActsparseError, RuntimeError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, ActsparseError) else 70
    CASE_RESULTS.mkdir(exist_ok=True)
    write_json(CASE_RESULTS / f"{result.name}.json", result.to_dict())
    return 0


def find_cases() -> list[str]:
    """
    List the cases of this folder.

    :return: Their files.
    """
    return [str(path) for path in sorted(CASES.glob("*.yaml"))]


def require_here(case: Case) -> None:
    """
    Check that a case is one of this folder's, whose results go by name.

    :param case: The case.
    :raises SourceError: If it is not.
    """
    if case.folder.resolve() != CASES:
        msg = f"{case.name} is not in {CASES}; actsparse regress measures any case"
        raise SourceError(msg)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmarks.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: the highest of the benchmarks'.
    """
    parser = argparse.ArgumentParser(description="Run benchmarks and regression cases, and keep their results.")
    known = (*BENCHMARKS, *LONG, DEMO)
    parser.add_argument("names", nargs="*", metavar="NAME|CASE", help=f"cases' files, or {', '.join(known)}")
    names = parser.parse_args(arguments).names or [*BENCHMARKS, DEMO, *find_cases()]
    try:
        for name in names:
            if name not in known:
                require_here(read_case(name))
    except ActsparseError as error:
        parser.error(str(error))
    RESULTS.mkdir(exist_ok=True)
    return max(run(name) for name in names)


if __name__ == "__main__":
    sys.exit(main())
