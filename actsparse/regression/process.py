"""Measure a case in a process of its own, so that its peak memory is the case's."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from actsparse.errors import ActsparseError
from actsparse.progress import hides_progress
from actsparse.regression.figures import CaseResult

_STDERR = 2


def measure_apart(path: Path) -> CaseResult:
    """
    Measure a case in a process of its own, which says what it does on standard error.

    :param path: The case's file.
    :return: Its figures.
    :raises ActsparseError: If the case cannot be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "actsparse.regression.child", str(path), str(answer)]
        command += ["--quiet"] if hides_progress() else []
        # Tables are for this process's standard output alone.
        code = subprocess.run(command, stdout=_STDERR).returncode
        if code == -signal.SIGINT:
            raise KeyboardInterrupt
        if not answer.is_file():
            msg = f"the process that measured {path} ended with code {code} and no figures"
            raise ActsparseError(msg)
        contents = json.loads(answer.read_bytes())
    if "mistake" in contents:
        raise ActsparseError(contents["mistake"])
    return CaseResult.from_dict(contents, "what the process wrote")
