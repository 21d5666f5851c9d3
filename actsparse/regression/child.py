"""Measure one case and write its figures to a file; `python -m actsparse.regression.child CASE FILE`."""

import signal
import sys
from pathlib import Path


def main() -> None:
    """Write the case's figures, or the mistake in it, as JSON."""
    from actsparse.errors import ActsparseError
    from actsparse.options import say
    from actsparse.regression.case import read_case
    from actsparse.regression.measure import measure_case
    from actsparse.report import write_json

    path, answer = map(Path, sys.argv[1:])
    try:
        contents = measure_case(read_case(path), say).to_dict()
    except ActsparseError as error:
        contents = {"mistake": str(error)}
    write_json(answer, contents)


if __name__ == "__main__":
    # Ctrl-C also reaches the process that started this one, and that one says so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
