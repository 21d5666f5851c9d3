"""
Feed damaged and made-up files and patterns to whatever reads a user's input: only actsparse's own errors may come out.

    python benchmarks/fuzz.py --inputs 10000 --json fuzz.json

hypothesis makes the inputs: valid ones with edits, and free ones. With `--atheris`, libFuzzer guides them by coverage
instead (pip install atheris; not a dependency). An input that takes too long counts as a hang.
"""

import argparse
import faulthandler
import importlib.util
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from fuzz_targets import TARGETS, Target
from hypothesis import HealthCheck, Phase, given, seed, settings

from actsparse.errors import ActsparseError

# The slowest input may take so long, on a machine that does other things too; what takes longer by far is ended.
SLOW_S, HANG_S = 15.0, 120.0


@dataclass
class Record:
    """
    What came of a target's inputs.

    :param count: How many there were.
    :param refused: How many were refused with one of actsparse's errors, in one line.
    :param failures: By place, the first input that raised something else there, and what.
    :param slowest: Seconds.
    :param slowest_input: The input that took them.
    """

    count: int = 0
    refused: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0
    slowest_input: str = ""


def measure(options: argparse.Namespace) -> Measurement:
    """
    Feed every target.

    :param options: The options.
    :return: Failures and the slowest input of each.
    """
    if options.atheris:
        return measure_with_atheris(options)
    bars, samples = [], {}
    for name in options.targets:
        announce(name)
        record = feed_target(TARGETS[name], options.inputs, options.seed)
        for place, what in record.failures.items():
            announce(f"{place}: {what}")
        note = f"{record.count} inputs, {record.refused} refused"
        bars.append(Bar(f"{name}: other errors than actsparse's", len(record.failures), 0, note=note))
        bars.append(Bar(f"{name}: slowest input", record.slowest, SLOW_S, unit="s"))
        bars.append(Bar(f"{name}: inputs", record.count, options.inputs, is_minimum=True))
        samples[name] = {"failures": record.failures, "slowest_input": record.slowest_input}
    return Measurement(tuple(bars), {"seed": options.seed, "targets": options.targets}, samples)


def feed_target(target: Target, inputs: int, random_seed: int) -> Record:
    """
    Feed a target with what hypothesis makes.

    :param target: The target.
    :param inputs: How many inputs.
    :param random_seed: Equal seeds make equal inputs.
    :return: What came of it.
    """
    record = Record()
    with tempfile.TemporaryDirectory() as folder:
        feed = target.prepare(Path(folder))

        @seed(random_seed)
        @settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(target.inputs)
        def feed_all(value: Any) -> None:
            note_outcome(record, feed, value)

        feed_all()
    return record


def note_outcome(record: Record, feed: Callable[[Any], object], value: Any) -> None:
    """
    Feed one input and note what came of it.

    :param record: Where to note it.
    :param feed: Takes the input.
    :param value: The input.
    """
    record.count += 1
    started = time.perf_counter()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            feed(value)
    except ActsparseError as error:
        record.refused += 1
        if "\n" in str(error):
            record.failures.setdefault("a message of several lines", f"{value!r:.300}: {error}")
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}"
        record.failures.setdefault(where, f"{value!r:.300}: {' '.join(str(error).split())[:300]}")
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.perf_counter() - started
    if seconds > record.slowest:
        record.slowest, record.slowest_input = seconds, f"{value!r:.300}"


def measure_with_atheris(options: argparse.Namespace) -> Measurement:
    """
    Feed every target with what atheris makes, each in a process of its own, which libFuzzer ends.

    :param options: The options.
    :return: The exit codes.
    :raises ActsparseError: If atheris is not installed.
    """
    if importlib.util.find_spec("atheris") is None:
        msg = "--atheris needs atheris: pip install atheris"
        raise ActsparseError(msg)
    bars = []
    for name in options.targets:
        announce(f"{name} with atheris")
        command = [sys.executable, __file__, "--worker", name, "--inputs", str(options.inputs)]
        done = subprocess.run([*command, "--seed", str(options.seed)], capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        if done.returncode != 0:
            announce(done.stderr[-3000:])
        bars.append(Bar(f"{name}: exit code of libFuzzer", abs(done.returncode), 0, note=last[:80]))
    return Measurement(tuple(bars), {"seed": options.seed, "targets": options.targets, "by": "atheris"})


def run_worker(name: str, inputs: int, random_seed: int) -> None:
    """
    Feed one target under atheris; does not return.

    :param name: The target.
    :param inputs: How many inputs.
    :param random_seed: Equal seeds make equal inputs.
    """
    import atheris  # pyright: ignore[reportMissingImports]

    target = TARGETS[name]
    feed = target.prepare(Path(tempfile.mkdtemp()))
    for module in [module for key, module in sys.modules.items() if key.startswith("actsparse")]:
        for function in [f for f in vars(module).values() if callable(f) and hasattr(f, "__code__")]:
            atheris.instrument_func(function)

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def feed_one(value: Any) -> None:
        record = Record()
        note_outcome(record, feed, value)
        if record.failures:
            raise AssertionError(record.failures)

    arguments = [f"-runs={inputs}", f"-seed={random_seed + 1}", f"-timeout={HANG_S:.0f}", "-rss_limit_mb=8192"]
    atheris.Setup([sys.argv[0], *arguments], feed_one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


def names_of_targets(text: str) -> list[str]:
    """
    Read which targets to feed.

    :param text: Names between commas.
    :return: The names.
    :raises ArgumentTypeError: If one is unknown.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in TARGETS:
            msg = f"{name!r} is none of {', '.join(TARGETS)}"
            raise argparse.ArgumentTypeError(msg)
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = make_plain_parser(__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=positive, default=10_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--targets", type=names_of_targets, default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--atheris", action="store_true", help="let coverage guide the inputs")
    parser.add_argument("--worker", choices=list(TARGETS), help="feed this target under atheris, in this process")
    options = parser.parse_args(arguments)
    if options.worker:
        run_worker(options.worker, options.inputs, options.seed)
    return run_benchmark("fuzz", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
