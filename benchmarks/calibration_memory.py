"""
Measure how much more memory calibration takes than the forward passes alone, for little and for much data.

    python benchmarks/calibration_memory.py --json calibration_memory.json

Every measurement is a process of its own, which loads the model, streams the batches and reports its own peaks: that of
the whole process, and that since the model was loaded, which loading cannot hide (Linux only).
"""

import argparse
import json
import math
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bars import Bar, Measurement
from command import announce, make_parser, positive, run_benchmark
from workload import SETTINGS, Batch, load_workload

from actsparse import sparsify_activations
from actsparse.commands.regression.nncf_reference import sparsify_with_nncf, translate_targets
from actsparse.errors import ActsparseError
from actsparse.runtime.environment import peak_memory

BAR_MB = 150.0
BARE, NNCF = "forward", "NNCF"
SIDES = (BARE, "magnitude", "nncf", NNCF)
WHOLE, SINCE_LOADING = "whole_process_mb", "since_loading_mb"
PEAKS = (WHOLE, SINCE_LOADING)
# Tells the kernel to forget the peak so far (proc(5)).
_FORGET_PEAK = "5"


def measure(options: argparse.Namespace) -> Measurement:
    """
    Start a process for every side and amount of data.

    :param options: The options.
    :return: The differences of the peaks.
    """
    sides = tuple(side for side in SIDES if side != NNCF or not options.no_nncf)
    samples: dict[str, list[dict[str, Any]]] = {}
    for repeat in range(options.repeats):
        for num_batches in options.sizes:
            for side in sides:
                # NNCF takes the same at any size, and half an hour for the larger one.
                if side == NNCF and num_batches != min(options.sizes):
                    continue
                announce(f"{side}, {num_batches} batches, repeat {repeat + 1} of {options.repeats}")
                samples.setdefault(f"{side}, {num_batches} batches", []).append(run_worker(options, side, num_batches))
    bars = [bar for num_batches in options.sizes for bar in make_bars(samples, sides, num_batches)]
    first = next(iter(samples.values()))[0]
    settings = first["settings"] | {"targets": SETTINGS[options.setting].title, "repeats": options.repeats}
    settings["calibration"] |= {"batches": options.sizes}
    peaks = {
        name: [{peak: run[peak] and round(run[peak], 1) for peak in PEAKS} for run in runs]
        for name, runs in samples.items()
    }
    return Measurement(tuple(bars), settings, peaks)


def make_bars(samples: dict[str, list[dict[str, Any]]], sides: Sequence[str], num_batches: int) -> list[Bar]:
    """
    Judge what each side takes beyond the forward passes, by the peak that differs more.

    :param samples: What each process reported.
    :param sides: The sides.
    :param num_batches: Number of batches.
    :return: The figures; bars are for `magnitude`.
    """
    bars = []
    for side in sides:
        runs, bare = (samples.get(f"{name}, {num_batches} batches", []) for name in (side, BARE))
        if side == BARE or not runs:
            continue
        differences = {peak: median_peak(runs, peak) - median_peak(bare, peak) for peak in PEAKS}
        known = {peak: size for peak, size in differences.items() if not math.isnan(size)}
        note = f"{median_peak(runs, WHOLE):.0f} MB, forward passes {median_peak(bare, WHOLE):.0f} MB"
        note += f"; since loading {differences[SINCE_LOADING]:+.0f} MB" if SINCE_LOADING in known else ""
        limit = BAR_MB if side == "magnitude" else None
        name = f"{side}, {num_batches} batches: peak above that of the forward passes"
        bars.append(Bar(name, max(known.values()), limit, unit="MB", note=note))
    return bars


def median_peak(runs: list[dict[str, Any]], peak: str) -> float:
    """
    Take the median of a peak.

    :param runs: What the processes reported.
    :param peak: Which peak.
    :return: The median in MB; NaN where the system does not tell.
    """
    values = [run[peak] for run in runs]
    return math.nan if None in values else median(values)


def run_worker(options: argparse.Namespace, side: str, num_batches: int) -> dict[str, Any]:
    """
    Measure one side in a process of its own.

    :param options: The options.
    :param side: What to run.
    :param num_batches: Number of batches.
    :return: What the process reported.
    :raises ActsparseError: If it failed; carries its last line.
    """
    command = [sys.executable, __file__, "--side", side, "--sizes", str(num_batches)]
    for name in ("model", "text", "length", "setting", "threads"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        msg = f"measuring {side} failed: {last.removeprefix('error: ')}"
        raise ActsparseError(msg)
    return json.loads(done.stdout.splitlines()[-1])


def measure_side(options: argparse.Namespace) -> dict[str, Any]:
    """
    Run one side here, and read this process's peaks.

    :param options: The options, `side` among them.
    :return: The peaks and the settings.
    """
    options.batches = options.sizes[0]
    work = load_workload(options)
    targets = SETTINGS[options.setting].targets
    can_reset = forget_peak()
    if options.side == BARE:
        with torch.no_grad():
            for batch in stream(work.batches):
                work.model(**batch)
    elif options.side == NNCF:
        translated = translate_targets(work.model, work.batches[0], targets)
        # nncf.Dataset reads its source more than once, so a generator would not do.
        sparsify_with_nncf(work.model, work.batches, translated)
    else:
        sparsify_activations(work.model, stream(work.batches), targets, algorithm=options.side)
    # Linux counts in kilobytes, macOS in bytes.
    unit = 1e6 if sys.platform == "darwin" else 1e3 / 1.024
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {WHOLE: whole, SINCE_LOADING: peak_memory() / 1e6 if can_reset else None, "settings": work.settings}


def stream(batches: list[Batch]) -> Iterator[Batch]:
    """
    Give batches one at a time, each made anew, so that whoever keeps them is seen to.

    :param batches: Model inputs.
    :return: Copies of them.
    """
    for batch in batches:
        yield {name: tensor.clone() for name, tensor in batch.items()}


def forget_peak() -> bool:
    """
    Let this process's peak memory begin anew.

    :return: Whether the system can do that.
    """
    try:
        Path("/proc/self/clear_refs").write_text(_FORGET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison, or one side of it.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    description = "Measure how much more memory calibration takes than the forward passes alone."
    parser = make_parser(description, num_batches=None)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[32, 256], help="numbers of batches to compare at")
    parser.add_argument("--repeats", type=positive, default=1, help="how many processes for each side and size")
    parser.add_argument("--setting", choices=SETTINGS, default="ffn", help="target sparsities")
    parser.add_argument("--no-nncf", action="store_true", help="leave NNCF's own call out; it takes minutes")
    parser.add_argument("--side", choices=SIDES, help="run this side alone, at the first size, and print its peaks")
    options = parser.parse_args(arguments)
    if options.side is None:
        return run_benchmark("calibration_memory", parser, measure, arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        sys.stdout.write(json.dumps(measure_side(options)) + "\n")
    except ActsparseError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
