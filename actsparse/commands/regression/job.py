"""The job behind `actsparse regress`: check everything, measure the cases, compare, accept, keep and draw."""

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from actsparse.commands.regression.case import Case, read_case
from actsparse.commands.regression.compare import REGRESSION, Difference, compare_case
from actsparse.commands.regression.figures import CaseResult
from actsparse.commands.regression.inputs import find_change, find_inputs
from actsparse.commands.regression.records import make_mapping
from actsparse.commands.regression.reference import (
    Reference,
    read_reference,
    read_result,
    results_folder,
    write_reference,
)
from actsparse.console.plot import plot_history
from actsparse.console.report import write_json
from actsparse.errors import ActsparseError, OutputError, SourceError
from actsparse.runtime.environment import read_git_state
from actsparse.runtime.progress import Say, hides_progress
from actsparse.storage.files import kind_of, prepare_folder

CASE_SUFFIXES = (".yaml", ".yml")
_STDERR = 2


@dataclass(frozen=True)
class RegressJob:
    """
    What `actsparse regress` is asked to do; see its help.

    :param cases: Files of cases, or names of the reference's; none for all that it has.
    :param update: Why the figures are to be accepted; None compares.
    :raises SourceError: If that does not go together.
    """

    cases: tuple[str, ...] = ()
    reference: Path | None = None
    update: str | None = None
    history: Path | None = None

    def __post_init__(self) -> None:
        if not self.cases and self.reference is None and self.history is None:
            msg = "give a case's file, --reference FILE, or --history DIR to draw"
            raise SourceError(msg)
        if self.update is not None and self.reference is None:
            msg = "--update rewrites a reference: give --reference FILE too"
            raise SourceError(msg)
        if self.update is not None and not self.update.strip():
            msg = "--update takes the reason why the figures are accepted, in words"
            raise SourceError(msg)
        if self.history is not None and importlib.util.find_spec("matplotlib") is None:
            msg = f"cannot draw {self.history}: matplotlib is not installed; pip install 'actsparse[plot]'"
            raise OutputError(msg)

    @property
    def written(self) -> tuple[Path, ...]:
        """What the job itself writes, which may lie in the checkout that it measures."""
        reference = () if self.reference is None else (self.reference, results_folder(self.reference))
        return (*reference, *(() if self.history is None else (self.history,)))

    @property
    def only_draws(self) -> bool:
        """Whether nothing is measured."""
        return not self.cases and self.reference is None


@dataclass(frozen=True)
class Outcome:
    """
    What came of a run.

    :param differences: What that is beside the reference, by case; without a reference empty.
    """

    results: Mapping[str, CaseResult]
    differences: Mapping[str, tuple[Difference, ...]]

    @property
    def is_regression(self) -> bool:
        """Whether any figure is worse than its tolerance allows."""
        return any(x.verdict == REGRESSION for differences in self.differences.values() for x in differences)

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the outcome into what JSON can hold.

        :return: Whether there is a regression, and each case's result and differences.
        """
        cases = {
            name: result.to_dict() | {"differences": [make_mapping(x) for x in self.differences.get(name, ())]}
            for name, result in self.results.items()
        }
        return {"is_regression": self.is_regression, "cases": cases}


def run_regress(job: RegressJob, say: Say) -> Outcome:
    """
    Measure cases, compare them with a reference or accept them as one, and keep them in a history.

    :raises ActsparseError: If something cannot be used, or a case is not the one that its reference was made of.
    """
    if job.only_draws:
        return Outcome({}, {})
    reference = _read_reference(job)
    cases = _find_cases(job, reference)
    # What takes seconds to find out is found out before hours are spent.
    for name, path in cases.items():
        _require_comparable(read_case(path), None if job.update is not None else reference)
        say(f"{name}: {path}")
    if job.history is not None:
        read_history(prepare_folder(job.history))
    if job.reference is not None:
        prepare_folder(job.reference.parent)
    git = {name: read_git_state(path.parent, job.written) for name, path in cases.items()}
    results: dict[str, CaseResult] = {}
    for name, path in cases.items():
        say(f"measuring {name}")
        results[name] = measure_apart(path, git[name])
        # At once: what a later case runs into does not take this one's figures.
        if job.history is not None:
            append_result(job.history, results[name])
    if job.reference is not None and job.update is not None:
        accepted = {name: (cases[name], result) for name, result in results.items()}
        state = read_git_state(job.reference.parent, job.written)
        write_reference(job.reference, reference, accepted, " ".join(job.update.split()), state)
        return Outcome(results, {})
    return Outcome(results, _compare_all(reference, results, say) if reference is not None else {})


def measure_apart(path: Path, git: dict[str, Any]) -> CaseResult:
    """
    Measure a case in a process of its own, which says what it does on standard error.

    :raises ActsparseError: If the case cannot be measured.
    :raises RuntimeError: If the process ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # Without the working folder on its path: a module there is not the library of the same name.
        command = [sys.executable, "-P", "-m", "actsparse.commands.regression.child", str(path), str(answer)]
        command += ["--quiet"] if hides_progress() else []
        # Tables are for this process's standard output alone.
        code = subprocess.run(command, stdout=_STDERR).returncode
        if code == -signal.SIGINT:
            raise KeyboardInterrupt
        if not answer.is_file():
            msg = f"the process that measured {path} ended with code {code} and no figures"
            raise RuntimeError(msg)
        contents = json.loads(answer.read_bytes())
    if "mistake" in contents:
        raise ActsparseError(contents["mistake"])
    return replace(CaseResult.from_dict(contents, "what the process wrote"), git=git)


def append_result(folder: Path, result: CaseResult) -> Path:
    """
    Keep a result; one of the same case and commit is replaced.

    :raises OutputError: If it cannot be written.
    """
    path = prepare_folder(folder / result.name) / f"{_name_commit(result)}.json"
    write_json(path, result.to_dict())
    return path


def read_history(folder: Path) -> dict[str, list[CaseResult]]:
    """
    Read all results of a history.

    :return: The results of each case, in the order of their commits.
    :raises SourceError: If a file is damaged.
    """
    found: dict[str, list[tuple[tuple[datetime, bool, str], CaseResult]]] = {}
    for path in sorted(folder.glob("*/*.json")):
        result = read_result(path)
        found.setdefault(path.parent.name, []).append((_order(result, path), result))
    return {name: [result for _, result in sorted(pairs, key=lambda pair: pair[0])] for name, pairs in found.items()}


def draw_history(folder: Path) -> list[Path]:
    """
    Draw each case's figures over commits.

    :param folder: The history's folder, which gets a PNG file for each case.
    :raises SourceError: If there are no results, or a file is damaged.
    :raises OutputError: If matplotlib is missing or a file cannot be written.
    """
    history = read_history(folder)
    if not history:
        msg = f"{folder} holds no results; --history with a case or a reference adds some"
        raise SourceError(msg)
    paths = []
    for name, results in history.items():
        paths.append(folder / f"{name}.png")
        plot_history([_point(result) for result in results], name, paths[-1])
    return paths


def _read_reference(job: RegressJob) -> Reference | None:
    if job.reference is None:
        return None
    if kind_of(job.reference) is None:
        if job.update is not None:
            return None
        msg = f"there is no reference {job.reference}; --update REASON with the files of cases makes one"
        raise SourceError(msg)
    return read_reference(job.reference)


def _find_cases(job: RegressJob, reference: Reference | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for given in job.cases or tuple(reference.cases if reference is not None else ()):
        is_file = given.endswith(CASE_SUFFIXES) or reference is None
        path = Path(given) if is_file else reference.case_path(given)  # type: ignore[union-attr]
        name = path.stem
        if name in found:
            msg = f"there are two cases named {name!r}: {found[name]} and {path}"
            raise SourceError(msg)
        if reference is not None and job.update is None:
            reference.find(name)
        found[name] = path
    if not found:
        msg = f"{job.reference} has no cases yet: name the files of cases to accept"
        raise SourceError(msg)
    return found


def _require_comparable(case: Case, reference: Reference | None) -> None:
    now = find_inputs(case).describe(case)
    if reference is None:
        return
    change = find_change(reference.read_result(case.name).inputs, now)
    if change is not None:
        msg = f"{case.name} is not what the reference was made of: {change}; --update REASON accepts it as it is now"
        raise SourceError(msg)


def _tell_versions(before: CaseResult, now: CaseResult, say: Say) -> None:
    """Say which libraries are others than the reference's: they may be why a figure moved."""
    versions = before.environment.get("versions")
    for library, new in now.environment["versions"].items():
        old = versions.get(library) if isinstance(versions, dict) else None
        if old != new:
            say(f"{now.name}: the reference was measured with {library} {old}, this with {new}")


def _compare_all(
    reference: Reference, results: Mapping[str, CaseResult], say: Say
) -> dict[str, tuple[Difference, ...]]:
    differences = {}
    for name, result in results.items():
        before = reference.read_result(name)
        differences[name] = compare_case(reference.find(name), before, result)
        _tell_versions(before, result, say)
    return differences


def _name_commit(result: CaseResult) -> str:
    commit = result.git.get("commit")
    if commit is None:
        return "no-commit-" + result.measured_at.replace(":", "").replace("+0000", "Z")
    return commit[:12] + ("-dirty" if result.git.get("is_dirty") else "")


def _order(result: CaseResult, path: Path) -> tuple[datetime, bool, str]:
    when = result.git.get("committed_at") or result.measured_at
    try:
        return datetime.fromisoformat(when).astimezone(), bool(result.git.get("is_dirty")), result.measured_at
    except (TypeError, ValueError, OverflowError):
        msg = f"{path} does not say when it was measured"
        raise SourceError(msg) from None


def _point(result: CaseResult) -> dict[str, object]:
    commit = result.git.get("commit")
    name = result.measured_at[:10] if commit is None else str(commit)[:8]
    return {
        "commit": name + ("*" if result.git.get("is_dirty") else ""),
        "figures": {name: (f.value, f.low, f.high) for name, f in result.figures.items()},
    }
