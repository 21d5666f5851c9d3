"""A folder of results, one file for each case and commit, and a plot of each case."""

from datetime import datetime
from pathlib import Path

from actsparse.commands.regression.figures import CaseResult
from actsparse.commands.regression.reference import read_result
from actsparse.console.plot import plot_history
from actsparse.console.report import write_json
from actsparse.errors import SourceError
from actsparse.storage.files import prepare_folder


def append_result(folder: Path, result: CaseResult) -> Path:
    """
    Keep a result; one of the same case and commit is replaced.

    :param folder: The history's folder.
    :param result: The result.
    :return: Its file.
    :raises OutputError: If it cannot be written.
    """
    path = prepare_folder(folder / result.name) / f"{_name_commit(result)}.json"
    write_json(path, result.to_dict())
    return path


def read_history(folder: Path) -> dict[str, list[CaseResult]]:
    """
    Read all results of a history.

    :param folder: Its folder.
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
    :return: The files.
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
