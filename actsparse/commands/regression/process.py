"""Measure a case in a process of its own, so that its peak memory is the case's."""

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from actsparse.commands.regression.figures import CaseResult
from actsparse.errors import ActsparseError
from actsparse.runtime.progress import hides_progress

_STDERR = 2


def measure_apart(path: Path, git: dict[str, Any]) -> CaseResult:
    """
    Measure a case in a process of its own, which says what it does on standard error.

    :param path: The case's file.
    :param git: The commit that it is measured at.
    :return: Its figures.
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
