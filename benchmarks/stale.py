"""Whether a result is still one of the code that is here."""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bars import ROOT

from actsparse.runtime.environment import run_git

# How results are written, not what is measured.
_PLUMBING = {"bars", "command"}


def find_sources(program: Path) -> set[Path]:
    """
    List a program and the modules beside it that it is made of.

    :param program: The program.
    :return: Their files.
    """
    found, waiting = set(), [program]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module not in _PLUMBING:
                beside = path.parent / f"{node.module}.py"
                waiting += [beside] if beside.is_file() else []
    return found


def find_reason(git: dict[str, Any] | None, paths: Sequence[str]) -> str | None:
    """
    Tell why a result is stale.

    :param git: What the result says of the code that it was measured on.
    :param paths: What it measures, from the checkout's top.
    :return: The reason; None for a result that is up to date.
    """
    commit = (git or {}).get("commit")
    if not isinstance(commit, str):
        return "does not say which commit was measured"
    short = commit[:10]
    if (git or {}).get("is_dirty") is not False:
        return f"was measured on {short} with changes that are in no commit"
    if run_git(ROOT, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        return f"was measured on {short}, which this checkout does not have"
    changed = run_git(ROOT, "diff", "--name-only", commit, "--", *paths)
    unknown = run_git(ROOT, "ls-files", "--others", "--exclude-standard", "--", *paths)
    if changed is None or unknown is None:
        return f"was measured on {short}, which git cannot compare with what is here"
    files = [*changed.split("\n"), *unknown.split("\n")]
    files = [file for file in files if file]
    if not files:
        return None
    others = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"was measured on {short}, and {files[0]}{others} changed since"
