"""Which commit a figure belongs to."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_git_state(folder: Path, excluded: Sequence[Path] = ()) -> dict[str, Any]:
    """
    Tell which commit a folder is at.

    Files that git does not know are no changes: results and caches often lie in a checkout.

    :param folder: The folder.
    :param excluded: Files and folders whose changes do not count.
    :return: The commit, when it was made, and whether the working tree differs from it; all None outside a checkout.
    """
    commit = run_git(folder, "rev-parse", "HEAD")
    top = run_git(folder, "rev-parse", "--show-toplevel")
    paths = [":/"]
    for path in excluded:
        absolute = path.absolute().resolve()
        if top is not None and absolute.is_relative_to(Path(top).resolve()):
            paths.append(f":(top,exclude,literal){absolute.relative_to(Path(top).resolve()).as_posix()}")
    changes = run_git(folder, "status", "--porcelain", "--untracked-files=no", "--", *paths)
    return {
        "commit": commit,
        "committed_at": run_git(folder, "show", "-s", "--format=%cI", "HEAD"),
        "is_dirty": None if commit is None or changes is None else bool(changes),
    }


def run_git(folder: Path, *arguments: str) -> str | None:
    """
    Ask git something.

    :param folder: Where.
    :param arguments: What.
    :return: Its answer; None where there is no git, no checkout, or no such thing in it.
    """
    # Without optional locks, so that asking never gets into the way of anyone who commits.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
