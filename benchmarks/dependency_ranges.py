"""
Install the lowest and the highest versions that pyproject.toml allows, each in a fresh environment, and test there.

    python benchmarks/dependency_ranges.py --json dependency_ranges.json

`uv` resolves both ends, with all extras; pip installs what it resolved, so that a torch for CPUs satisfies the pin. It
needs a package index, some gigabytes of disk and a quarter of an hour; `--resolve-only` only resolves.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bars import ROOT, Bar, Measurement
from command import announce, make_plain_parser, run_benchmark
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

from actsparse.errors import ActsparseError, shorten_message

ENDS = {"lowest": "lowest-direct", "highest": "highest"}
EXTRAS = ("hub", "plot", "eval", "dev")
# Installed as `make` does: optimum-intel asks for torchvision, which would bring another torch.
WITHOUT_DEPENDENCIES = ("optimum", "optimum-intel", "openvino-genai", "openvino-tokenizers")
# One or two files for every library that the package stands on; minutes, and no download.
TESTS = (
    "tests/test_sparsify.py",
    "tests/test_thresholds.py",
    "tests/test_cli.py",
    "tests/torch/test_offload.py",
    "tests/test_compensation.py",
    "tests/algorithms/test_registry_properties.py",
    "tests/evaluation",
    "tests/torch/measurements",
    "tests/models",
    "tests/openvino/test_export.py",
    "tests/openvino/test_deploy.py",
    "tests/openvino/test_backend.py",
    "tests/commands/regression",
    "tests/scopes",
    "tests/commands/studies/test_tasks.py",
    "tests/texts",
)


class RangeError(ActsparseError):
    """A range cannot be resolved or installed."""


@dataclass(frozen=True)
class Outcome:
    """
    What the tests said.

    :param passed: How many passed.
    :param failed: How many did not, or could not run.
    """

    passed: int
    failed: int


def measure(options: argparse.Namespace) -> Measurement:
    """
    Resolve both ends and, unless told otherwise, test them.

    :param options: The options.
    :return: Failed tests at each end.
    """
    resolved = {end: resolve(end) for end in ENDS}
    show_versions(resolved)
    settings = {"python": sys.version.split()[0], "extras": [*EXTRAS, "openvino"]}
    bars = [Bar(f"{end}: direct dependencies resolved", len(direct(resolved[end]))) for end in ENDS]
    if options.resolve_only:
        return Measurement(tuple(bars), settings, resolved)
    with tempfile.TemporaryDirectory(prefix="dependency-ranges-", dir=options.folder) as folder:
        for end, versions in resolved.items():
            python = install(end, versions, Path(folder) / end)
            outcome = run_tests(end, python)
            note = f"{outcome.passed} passed"
            bars.append(Bar(f"{end} versions: tests failed", outcome.failed, 0, note=note))
            bars.append(Bar(f"{end} versions: tests passed", outcome.passed, 1, is_minimum=True))
    return Measurement(tuple(bars), settings | {"tests": list(TESTS)}, resolved)


def resolve(end: str) -> dict[str, str]:
    """
    Find the versions of one end.

    :param end: One of `ENDS`.
    :return: Versions by canonical name, those of indirect dependencies too.
    :raises RangeError: If the ranges contradict each other.
    """
    announce(f"resolving the {end} versions")
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--all-extras", "--resolution", ENDS[end], "--python", sys.executable, "pyproject.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        msg = f"the {end} versions cannot be resolved: {shorten_message(RuntimeError(done.stderr), 600)}"
        raise RangeError(msg)
    pins = (line.partition(";")[0].strip().split("==") for line in done.stdout.splitlines() if "==" in line)
    return {canonicalize_name(name): version for name, version in pins}


def direct(versions: dict[str, str]) -> dict[str, str]:
    """
    Select what pyproject.toml names itself.

    :param versions: Versions by name.
    :return: Those of direct dependencies.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    names = sorted({canonicalize_name(Requirement(text).name) for text in texts})
    return {name: versions[name] for name in names}


def show_versions(resolved: dict[str, dict[str, str]]) -> None:
    """
    Print the direct dependencies of both ends side by side.

    :param resolved: Versions by end and name.
    """
    table = Table(title="Versions")
    for heading in ("package", *resolved):
        table.add_column(heading)
    for name in direct(resolved["lowest"]):
        table.add_row(name, *(versions[name] for versions in resolved.values()))
    Console().print(table)


def install(end: str, versions: dict[str, str], folder: Path) -> Path:
    """
    Make an environment with the versions of one end.

    :param end: Which one.
    :param versions: Its versions.
    :param folder: Where to make it.
    :return: Its Python.
    :raises RangeError: If pip cannot install them.
    """
    announce(f"installing the {end} versions into {folder}")
    python = folder / "bin" / "python"
    pins = folder.with_suffix(".txt")
    pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pins)]
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "-e", f"{ROOT}[{','.join(EXTRAS)}]"],
        [*pip, "--no-deps", *WITHOUT_DEPENDENCIES],
    ):
        done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
        if done.returncode != 0:
            msg = f"the {end} versions cannot be installed: {shorten_message(RuntimeError(done.stderr), 600)}"
            raise RangeError(msg)
    return python


def run_tests(end: str, python: Path) -> Outcome:
    """
    Run the chosen tests.

    :param end: What is tested.
    :param python: The environment's Python.
    :return: How many passed and failed; their names go to standard error.
    """
    announce(f"testing the {end} versions")
    command = [str(python), "-m", "pytest", "-q", "-m", "not real_model", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            announce(line)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", last)}
    # pytest that does not even start has no counts, and is no success.
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return Outcome(counts.get("passed", 0), failed or int(done.returncode != 0))


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = make_plain_parser(__doc__.split("\n\n")[0])
    parser.add_argument("--resolve-only", action="store_true", help="install and test nothing")
    parser.add_argument("--folder", type=Path, help="where to make the environments; the temporary folder by default")
    return run_benchmark("dependency_ranges", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
