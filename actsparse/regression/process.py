"""Measure a case in a process of its own, so that its peak memory is the case's."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from actsparse.errors import ActsparseError
from actsparse.regression.case import read_case
from actsparse.regression.figures import CaseResult
from actsparse.regression.measure import measure_case
from actsparse.report import write_json

_INTERRUPTED = 130
_STDERR = 2


def measure_apart(path: Path) -> CaseResult:
    """
    Measure a case in a process of its own.

    :param path: The case's file.
    :return: Its figures.
    :raises ActsparseError: If the case cannot be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        # Tables are for this process's standard output; whatever that one says goes where errors go.
        code = subprocess.run([sys.executable, "-m", __name__, str(path), str(answer)], stdout=_STDERR).returncode
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
        if not answer.is_file():
            msg = f"the process that measured {path} ended with code {code} and no figures"
            raise ActsparseError(msg)
        contents = json.loads(answer.read_bytes())
    if "mistake" in contents:
        raise ActsparseError(contents["mistake"])
    return CaseResult.from_dict(contents, "what the process wrote")


def main() -> None:
    """Measure the case that the first argument names, and write its figures where the second one says."""
    from actsparse.options import say

    path, answer = map(Path, sys.argv[1:])
    try:
        write_json(answer, measure_case(read_case(path), say).to_dict())
    except ActsparseError as error:
        write_json(answer, {"mistake": str(error)})
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
