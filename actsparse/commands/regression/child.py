"""Measure one case and write its figures to a file: `-m actsparse.commands.regression.child CASE FILE [--quiet]`."""

import signal
import sys
from contextlib import nullcontext
from pathlib import Path


def main() -> None:
    """Write the case's figures, or the mistake in it, as JSON."""
    from actsparse.commands.regression.case import read_case
    from actsparse.commands.regression.measure import measure_case
    from actsparse.console.output import tell
    from actsparse.console.report import write_json
    from actsparse.errors import ActsparseError
    from actsparse.runtime.progress import hide_progress

    path, answer, *options = sys.argv[1:]
    is_quiet = "--quiet" in options
    try:
        with hide_progress() if is_quiet else nullcontext():
            contents = measure_case(read_case(path), (lambda _: None) if is_quiet else tell).to_dict()
    except ActsparseError as error:
        contents = {"mistake": str(error)}
    write_json(Path(answer), contents)


if __name__ == "__main__":
    # Ctrl-C also reaches the process that started this one, and that one says so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
