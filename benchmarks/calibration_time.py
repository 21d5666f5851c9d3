"""
Time calibration against the bare forward passes that it cannot do without, and against NNCF's.

    python benchmarks/calibration_time.py --json calibration_time.json

The whole call is timed, graph tracing included.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from bars import Bar, Measurement
from command import announce, make_parser, positive, run_benchmark
from timing import time_interleaved
from torch import nn
from workload import SETTINGS, Batch, Workload, load_workload

from actsparse import remove_sparsifiers, sparsify_activations
from actsparse.commands.regression.nncf_reference import sparsify_with_nncf, translate_targets

FORWARD_BAR = 1.3
NNCF_BAR = 4.0
BARE, OURS, NNCF = "forward passes", "magnitude", "NNCF"
WARM_UP = 2


def measure(options: argparse.Namespace) -> Measurement:
    """
    Time the forward passes, our calls and NNCF's call.

    :param options: The options.
    :return: The ratios of the medians.
    """
    work = load_workload(options)
    targets = SETTINGS[options.setting].targets
    contenders = make_contenders(work.model, work.batches, targets)
    announce("warming up")
    for run in make_contenders(work.model, work.batches[:WARM_UP], targets).values():
        run()
        remove_sparsifiers(work.model)
    announce(f"timing {', '.join(contenders)}: {options.repeats} repeats")
    samples = time_interleaved(contenders, repeats=options.repeats, clean_up=lambda: remove_sparsifiers(work.model))
    if not options.no_nncf:
        announce("timing NNCF")
        with_nncf = make_nncf_contender(work, targets) | {OURS: contenders[OURS]}
        for name, seconds in time_interleaved(with_nncf, repeats=1).items():
            samples.setdefault(name, []).extend(seconds)
    settings = work.settings | {"targets": SETTINGS[options.setting].title, "repeats": options.repeats}
    return Measurement(make_bars(samples), settings, {"seconds": samples})


def make_contenders(model: nn.Module, batches: list[Batch], targets: Any) -> dict[str, Callable[[], Any]]:
    """
    Prepare what is timed in turn; each starts from a model without masks.

    :param model: The model.
    :param batches: Calibration batches.
    :param targets: Target sparsities.
    :return: The calls, by name.
    """
    return {
        BARE: partial(run_forward, model, batches),
        OURS: partial(sparsify_activations, model, batches, targets, algorithm="magnitude"),
        "nncf": partial(sparsify_activations, model, batches, targets, algorithm="nncf"),
    }


def make_nncf_contender(work: Workload, targets: Any) -> dict[str, Callable[[], Any]]:
    """
    Prepare NNCF's own call, on a copy as it leaves its masks on the model.

    :param work: The model and the data.
    :param targets: Target sparsities.
    :return: The call, by name.
    """
    translated = translate_targets(work.model, work.batches[0], targets)
    model = copy.deepcopy(work.model)
    return {NNCF: partial(sparsify_with_nncf, model, work.batches, translated)}


def run_forward(model: nn.Module, batches: list[Batch]) -> None:
    """
    Run the batches and do nothing else.

    :param model: The model.
    :param batches: Model inputs.
    """
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def make_bars(samples: dict[str, list[float]]) -> tuple[Bar, ...]:
    """
    Judge the medians.

    :param samples: Seconds of every call, by name.
    :return: The figures.
    """
    medians = {name: median(seconds) for name, seconds in samples.items()}
    notes = f"{medians[OURS]:.1f} s over {medians[BARE]:.1f} s"
    bars = [
        Bar("magnitude: time over that of the forward passes", medians[OURS] / medians[BARE], FORWARD_BAR, note=notes)
    ]
    if NNCF in medians:
        notes = f"{medians[NNCF]:.1f} s over {medians[OURS]:.1f} s"
        bars.append(Bar("magnitude: times faster than NNCF", medians[NNCF] / medians[OURS], NNCF_BAR, True, note=notes))
    bars.append(Bar('algorithm="nncf": time over that of the forward passes', medians["nncf"] / medians[BARE]))
    bars += [Bar(f"{name}: median", seconds, unit="s") for name, seconds in medians.items()]
    return tuple(bars)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_parser("Time calibration against bare forward passes and against NNCF.")
    parser.add_argument("--repeats", type=positive, default=3, help="how often to time each side")
    parser.add_argument("--setting", choices=SETTINGS, default="ffn", help="target sparsities")
    parser.add_argument("--no-nncf", action="store_true", help="leave NNCF's own call out; it takes minutes")
    return run_benchmark("calibration_time", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
