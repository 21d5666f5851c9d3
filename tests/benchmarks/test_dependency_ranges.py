"""The ranges in pyproject.toml hold what constraints.txt pins, and can be resolved at both ends."""

import importlib
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
REQUIREMENTS = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS)]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in LINES) if pin}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_a_range_has_two_ends_and_holds_the_pinned_version(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators in ({">=", "<"}, {"=="})
    assert Version(PINS[canonicalize_name(requirement.name)]) in requirement.specifier


@pytest.mark.real_model
def test_both_ends_can_be_resolved() -> None:
    # Asks the package index, as the download of the default model does.
    assert importlib.util.find_spec("uv")
    command = [sys.executable, "benchmarks/dependency_ranges.py", "--resolve-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_tests_that_run_at_both_ends_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("dependency_ranges")
    sys.modules.pop("dependency_ranges")
    assert [path for path in module.TESTS if not (ROOT / path).exists()] == []
