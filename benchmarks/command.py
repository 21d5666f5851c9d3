"""The command line that the benchmarks share."""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bars import Measurement, describe_run, make_table, read_git_state, write_json
from rich.console import Console

from actsparse.errors import ActsparseError
from actsparse.runtime.environment import describe_machine


def make_parser(description: str, *, num_batches: int | None = 32, length: int = 256) -> argparse.ArgumentParser:
    """
    Make a parser with the options of benchmarks that calibrate a torch model.

    :param description: What the benchmark does.
    :param num_batches: Default number of calibration batches; None for a benchmark that has other numbers of them.
    :param length: Default number of tokens in each.
    :return: The parser, to add the benchmark's own options to.
    """
    parser = make_plain_parser(description)
    parser.add_argument("--model", default="default", help="hub id, folder, GGUF file or default")
    parser.add_argument("--text", default="wiki", help="calibration text: wiki (packaged), or any text source")
    if num_batches is not None:
        parser.add_argument("--batches", type=positive, default=num_batches, help="how many calibration batches")
    parser.add_argument("--length", type=positive, default=length, help="tokens in each calibration batch")
    parser.add_argument("--threads", type=positive, help="threads that torch uses, if not its own choice")
    return parser


def make_plain_parser(description: str) -> argparse.ArgumentParser:
    """
    Make a parser for a benchmark that calibrates nothing of its own.

    :param description: What the benchmark does.
    :return: The parser, to add the benchmark's own options to.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.set_defaults(threads=None)
    return parser


def positive(text: str) -> int:
    """
    Read a count.

    :param text: What the user wrote.
    :return: The number.
    :raises ArgumentTypeError: If it is not a whole number of at least 1.
    """
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        msg = f"{text!r} is not a whole number of at least 1"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def run_benchmark(
    name: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Measurement],
    arguments: Sequence[str] | None,
) -> int:
    """
    Run a benchmark from its command line: measure, show the table, write the JSON file.

    :param name: The benchmark's name.
    :param parser: Reads its options.
    :param measure: Measures, given the options.
    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.threads:
        torch.set_num_threads(options.threads)
    load_before = describe_machine()["load_average"]
    # Before it begins: what is committed or written meanwhile is not what was measured.
    git_state = read_git_state()
    started = time.perf_counter()
    try:
        measurement = measure(options)
    except ActsparseError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    seconds = time.perf_counter() - started
    Console().print(make_table(f"{name} ({seconds:.0f} s)", measurement.bars))
    if options.json:
        command = shlex.join(["python", f"benchmarks/{name}.py", *_without_json(arguments)])
        timing: dict[str, Any] = {"seconds": round(seconds, 1), "load_average_before": load_before}
        write_json(options.json, describe_run(name, command, measurement, git_state) | timing)
    return 0 if measurement.is_met else 1


def announce(step: str) -> None:
    """
    Tell on stderr what begins.

    :param step: What begins.
    """
    Console(stderr=True).print(f"{step} …", markup=False, highlight=False, soft_wrap=True)


def _without_json(arguments: Sequence[str]) -> list[str]:
    # Where a report was first written says nothing of what it reports.
    kept = list(arguments)
    for position, argument in enumerate(arguments):
        if argument == "--json":
            return kept[:position] + kept[position + 2 :]
        if argument.startswith("--json="):
            return kept[:position] + kept[position + 1 :]
    return kept
