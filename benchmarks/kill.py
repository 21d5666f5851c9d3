"""
Kill commands with SIGKILL at random moments, look at what they leave, and run them again in the same folder.

    OMP_NUM_THREADS=1 python benchmarks/kill.py --json kill.json

Every file that a killed run leaves has to be whole, and the next run has to succeed with the figures of an undisturbed
one. Commands run in forks of one process that has imported everything, so that moments fall into work and not into
imports; half of the runs start in the folder of a finished one. `--operations N` also kills just before N of the
command's operations on files, evenly spread, where random moments seldom fall.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark

from actsparse.commands.sparsify import UNFINISHED_NAME
from actsparse.errors import ActsparseError, nearest
from actsparse.storage.files import UNFINISHED

# Figures of two runs are equal to so many parts; times are not figures.
TOLERANCE = 1e-5
NOT_FIGURES = ("seconds", "environment", "verdict", "peak_memory", "decoding")
# A fork that takes so many times as long as the undisturbed run hangs.
PATIENCE = 20.0

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Case:
    """
    A command to kill.

    :param arguments: Its command line, with ``{model}``, ``{out}``, ``{text}`` and ``{batches}``.
    :param is_resumable: Whether a second run in its folder has less to do.
    """

    arguments: str
    is_resumable: bool = False


_TEXTS = "--calibration {text} --batches {batches}"
CASES = {
    "sparsify": Case(f"sparsify {{model}} --out {{out}} --sparsity 0.5 --algorithm magnitude {_TEXTS}"),
    "sweep": Case(
        "sweep {model} --out {out} --sparsity 0.4,0.5 --algorithms magnitude --text {text} --pages 1 "
        f"--max-length 64 {_TEXTS}",
        is_resumable=True,
    ),
    "demo": Case(f"demo --model {{model}} --out {{out}} --text {{text}} --pages 1 {_TEXTS}"),
    "recover": Case(
        "sparsify {model} --out {out} --sparsity 0.5 --algorithm magnitude --recover 3 --training {text} "
        f"--int8 asym {_TEXTS}"
    ),
    "accelerate": Case(f"sparsify {{model}} --out {{out}} --sparsity 0.5 --int8 asym --accelerate {_TEXTS}"),
}
ISSUED = ("sparsify", "sweep", "demo")


@dataclass(frozen=True)
class Moment:
    """
    When to kill.

    :param seconds: So long after the start; or
    :param operation: before this one of the operations on files in the output folder, counted from 0.
    """

    seconds: float = math.inf
    operation: int | None = None

    def __str__(self) -> str:
        return f"operation {self.operation}" if self.operation is not None else f"{self.seconds:.2f} s"


@dataclass(frozen=True)
class Run:
    """
    How a command went.

    :param seconds: How long it ran.
    :param code: Its exit code; negative for a signal.
    :param operations: Its operations on files, where it lived to tell.
    :param last_word: The last line that it wrote on standard error.
    """

    seconds: float
    code: int
    operations: int
    last_word: str


def measure(options: argparse.Namespace) -> Measurement:
    """
    Kill every command.

    :param options: The options.
    :return: What was not whole, and what did not run again.
    """
    # Forks share all of it.
    import actsparse.cli
    import actsparse.commands.demo
    import actsparse.commands.sparsify
    import actsparse.commands.sweep  # noqa: F401

    generator = random.Random(options.seed)
    bars, samples = [], {}
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        for name in options.commands:
            trials = list(try_command(name, options, generator, Path(folder)))
            samples[name] = trials
            killed = [trial for trial in trials if trial["code"] == -signal.SIGKILL]
            note = f"{len(trials)} runs, {len(killed)} killed before their end"
            bars.append(Bar(f"{name}: files not whole", sum(len(trial["faults"]) for trial in trials), 0, note=note))
            failed = [trial for trial in trials if trial["rerun"]]
            bars.append(Bar(f"{name}: runs in the same folder that fail or differ", len(failed), 0))
            bars.append(Bar(f"{name}: killed", len(killed), 1, is_minimum=True))
    settings = {"model": options.model, "text": options.text, "batches": options.batches, "seed": options.seed}
    return Measurement(tuple(bars), settings, samples)


def try_command(
    name: str, options: argparse.Namespace, generator: random.Random, folder: Path
) -> Iterator[dict[str, Any]]:
    """
    Kill one command at all its moments.

    :param name: One of `CASES`.
    :param options: The options.
    :param generator: Chooses the moments.
    :param folder: Where to work.
    :return: For each moment, what was left and how the second run went.
    :raises ActsparseError: If the undisturbed run fails.
    """
    finished, out = folder / f"{name}-finished", folder / name
    announce(f"{name}, undisturbed")
    whole = run(make_arguments(name, options, finished), finished, Moment(), math.inf)
    faults = fork(find_faults, finished, None)
    if whole.code != 0 or faults:
        msg = f"{name} fails undisturbed: {'; '.join(faults) or whole.last_word}"
        raise ActsparseError(msg)
    shortest = whole.seconds
    count = min(options.operations, whole.operations)
    last = [i * whole.operations // count for i in range(count)]
    for number in range(options.moments + count):
        is_random = number < options.moments
        moment = (
            Moment(seconds=generator.uniform(0, shortest))
            if is_random
            else Moment(operation=last[number - options.moments])
        )
        shutil.rmtree(out, ignore_errors=True)
        if number % 2 and not CASES[name].is_resumable:
            shutil.copytree(finished, out)
        arguments = make_arguments(name, options, out)
        killed = run(arguments, out, moment, whole.seconds)
        if killed.code == 0:
            # On a machine that does other things, too, the undisturbed run may have taken longer than most.
            shortest = min(shortest, killed.seconds)
        left = sorted(list_files(out))
        faults = fork(find_faults, out, finished)
        again = run(arguments, out, Moment(), whole.seconds)
        rerun = fork(find_differences, out, finished) if again.code == 0 else [f"exit {again.code}: {again.last_word}"]
        announce(
            f"{name} {number + 1} of {options.moments + count}, {moment}: {'; '.join([*faults, *rerun]) or 'well'}"
        )
        yield {"moment": str(moment), "code": killed.code, "left": left, "faults": faults, "rerun": rerun}


def make_arguments(name: str, options: argparse.Namespace, out: Path) -> list[str]:
    """
    Fill in a command line.

    :param name: One of `CASES`.
    :param options: The options.
    :param out: The output folder.
    :return: The words.
    """
    values = {"model": options.model, "text": options.text, "batches": str(options.batches), "out": str(out)}
    return [word.format(**values) for word in CASES[name].arguments.split()]


def run(arguments: Sequence[str], out: Path, moment: Moment, expected: float) -> Run:
    """
    Run a command in a fork of its own group of processes, and perhaps kill it.

    :param arguments: Its command line.
    :param out: Its output folder.
    :param moment: When to kill it; a moment that never comes lets it end.
    :param expected: Seconds that it should take.
    :return: How it went.
    """
    with tempfile.NamedTemporaryFile() as errors, tempfile.NamedTemporaryFile() as count:
        process = _fork.Process(target=_command, args=(arguments, out, moment.operation, errors.name, count.name))
        started = time.perf_counter()
        process.start()
        limit = None if math.isinf(expected) else PATIENCE * expected + 60
        process.join(moment.seconds if math.isfinite(moment.seconds) else limit)
        seconds = time.perf_counter() - started
        if process.exitcode is None and process.pid is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not yet a group of its own
                process.kill()
        process.join()
        lines = Path(errors.name).read_text(errors="replace").strip().splitlines()
        operations = int(Path(count.name).read_text() or 0)
    return Run(seconds, process.exitcode or 0, operations, lines[-1] if lines else "")


def _command(arguments: Sequence[str], out: Path, last: int | None, errors: str, count: str) -> None:
    """Be the command: a process group of its own that counts its operations on files and may die before one."""
    os.setsid()
    handle = os.open(errors, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    seen = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"):
            return
        if event == "open" and not (isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if not any(str(detail).startswith(f"{out}{os.sep}") for detail in details):
            return
        if seen == last:
            os.killpg(0, signal.SIGKILL)
        seen += 1

    sys.addaudithook(watch)
    from actsparse import cli

    sys.argv = ["actsparse", *arguments]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    Path(count).write_text(str(seen))
    sys.stderr.flush()
    os._exit(code)


def fork(look: Callable[[Path, Path | None], list[str]], out: Path, finished: Path | None) -> list[str]:
    """
    Look at a folder in a fork, so that this process stays without threads.

    :param look: What to do.
    :param out: The folder.
    :param finished: The folder of the undisturbed run.
    :return: What it returns.
    """
    receiver, sender = _fork.Pipe(duplex=False)
    process = _fork.Process(target=lambda: sender.send(look(out, finished)))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = [f"{out} could not be looked at"]
    process.join()
    return found


def find_faults(out: Path, finished: Path | None) -> list[str]:
    """
    Say which files of a folder are not whole.

    :param out: The folder; it may not exist.
    :param finished: The folder of the undisturbed run, whose files alone may be there; None for that one itself.
    :return: What is wrong.
    """
    faults = []
    expected = None if finished is None else list_files(finished) | {"recovery.checkpoint"}
    for name in sorted(list_files(out)):
        # What was measured before the end is there to go on from.
        if expected is not None and name not in expected and not name.startswith(UNFINISHED_NAME):
            faults.append(f"{name} should not be there")
            continue
        try:
            read_file(out / name)
        except Exception as error:
            faults.append(f"{name} cannot be read: {' '.join(str(error).split())[:200]}")
    return faults


def list_files(out: Path) -> set[str]:
    """
    List the files of a folder, without unfinished ones, which nobody reads.

    :param out: The folder; it may not exist.
    :return: Their paths below it.
    """
    paths = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    return {str(path) for path in paths if not any(part.startswith(UNFINISHED) for part in path.parts)}


def read_file(path: Path) -> None:
    """
    Read a file as whoever uses it would, with all that belongs to it.

    :param path: The file.
    :raises Exception: If it is not whole.
    """
    from PIL import Image
    from safetensors import safe_open

    from actsparse.models import load_model
    from actsparse.openvino import load_causal_lm
    from actsparse.thresholds import read_thresholds

    if path.stat().st_size == 0:
        msg = "it is empty"
        raise ValueError(msg)
    if path.suffix == ".json":
        json.loads(path.read_bytes())
    if path.name == "thresholds.safetensors":
        read_thresholds(path)
    elif path.suffix == ".safetensors" or path.name == "recovery.checkpoint":
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                file.get_tensor(key)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    elif path.name == "config.json" and (path.parent / "model.safetensors").exists():
        load_model(str(path.parent), torch_only=True)
    elif path.name == "openvino_model.xml":
        load_causal_lm(path.parent, compile=False)


def find_differences(out: Path, finished: Path | None) -> list[str]:
    """
    Say in what a folder differs from that of the undisturbed run.

    :param out: The folder of the second run.
    :param finished: That of the undisturbed one.
    :return: Faults, files too many or too few, unfinished ones, other figures.
    """
    assert finished is not None
    differences = find_faults(out, finished)
    here, there = list_files(out), list_files(finished)
    differences += [f"{name} is missing" for name in sorted(there - here)]
    differences += [f"{name} is left over" for name in sorted(here - there)]
    differences += [f"{path.name} is unfinished" for path in out.rglob(f"{UNFINISHED}*")]
    for name in sorted(here & there):
        if not are_figures_equal(read_figures(out / name), read_figures(finished / name)):
            differences.append(f"{name} has other figures")
    return differences


def read_figures(path: Path) -> Any:
    """
    Read what two runs should have in common.

    :param path: A JSON or thresholds file; of others there is nothing to compare.
    :return: Its figures.
    """
    from actsparse.thresholds import read_thresholds

    if path.name == "thresholds.safetensors":
        return {name: threshold.tolist() for name, threshold in read_thresholds(path).thresholds.items()}
    return json.loads(path.read_bytes()) if path.suffix == ".json" else None


def are_figures_equal(a: Any, b: Any) -> bool:
    """
    Compare figures, leaving times out.

    :param a: Figures as JSON holds them.
    :param b: Others.
    :return: Whether they are equal but for rounding.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {key for key in a.keys() | b.keys() if not any(part in key for part in NOT_FIGURES)}
        return all(key in a and key in b and are_figures_equal(a[key], b[key]) for key in keys)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(are_figures_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return a == b


def names_of_commands(text: str) -> list[str]:
    """
    Read which commands to kill.

    :param text: Names between commas.
    :return: The names.
    :raises ArgumentTypeError: If one is unknown.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in CASES:
            msg = f"{name!r} is none of {', '.join(CASES)}; nearest: {nearest(name, CASES, 1)}"
            raise argparse.ArgumentTypeError(msg)
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = make_plain_parser(__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="default", help="what to run the commands on")
    parser.add_argument("--text", default="default", help="calibration, training and evaluation text")
    parser.add_argument("--batches", type=positive, default=4, help="calibration batches")
    parser.add_argument("--commands", type=names_of_commands, default=list(ISSUED), help=f"of {', '.join(CASES)}")
    parser.add_argument("--moments", type=int, default=20, help="random moments for each command")
    parser.add_argument("--operations", type=int, default=0, help="file operations to kill each command at")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return run_benchmark("kill", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
