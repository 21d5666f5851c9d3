"""
Measure, layer by layer, how far the sparsity is from its target: on the calibration data and on other text.

    python benchmarks/target_met.py --json target_met.json

Zeros are counted behind the masks while all masks are active: ours with both algorithms, and NNCF's own.
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from typing import Any

from bars import Bar, Measurement
from command import announce, make_parser, positive, run_benchmark
from workload import SETTINGS, Batch, Workload, describe_text, load_wikitext, load_workload

from actsparse import measure_sparsity, remove_sparsifiers, sparsify_activations
from actsparse.commands.regression.nncf_reference import (
    count_nncf_zeros,
    find_layer_names,
    named_nncf_sparsifiers,
    sparsify_with_nncf,
    translate_targets,
)
from actsparse.texts import token_batches
from actsparse.torch.running import run_batches

CALIBRATION, WIKITEXT = "calibration data", "WikiText"
# Largest deviation of any layer from its target, in percentage points.
BARS = {CALIBRATION: 0.2, WIKITEXT: 3.0}
ALGORITHMS = ("magnitude", "nncf")
NNCF = "NNCF"

Deviations = dict[str, float]


def measure(options: argparse.Namespace) -> Measurement:
    """
    Calibrate with every side in every setting, and count zeros on both texts.

    :param options: The options.
    :return: The deviations.
    """
    work = load_workload(options)
    text = load_wikitext()
    other = token_batches(work.tokenizer, text, num_batches=options.eval_batches, length=options.eval_length)
    texts = {CALIBRATION: work.batches, WIKITEXT: other}
    samples: dict[str, dict[str, dict[str, Deviations]]] = {}
    bars = []
    for name in options.settings:
        title, targets = SETTINGS[name]
        announce(f"{title}: {', '.join(ALGORITHMS)}{'' if options.no_nncf else ', NNCF'}")
        found = {algorithm: measure_ours(work, targets, algorithm, texts) for algorithm in ALGORITHMS}
        if not options.no_nncf:
            found[NNCF] = measure_nncf(work, targets, texts)
        samples[title] = found
        bars += [bar for where in texts for bar in make_bars(title, where, found)]
    settings = work.settings | {"evaluation": describe_text(text, options.eval_batches, options.eval_length)}
    settings |= {"targets": [SETTINGS[name].title for name in options.settings], "tokens_masked": "all"}
    return Measurement(tuple(bars), settings, {"points_from_target": samples})


def measure_ours(work: Workload, targets: Any, algorithm: str, texts: dict[str, list[Batch]]) -> dict[str, Deviations]:
    """
    Measure our masks.

    :param work: The model, left as it is, and the calibration batches.
    :param targets: Target sparsities.
    :param algorithm: The algorithm.
    :param texts: Batches to measure on, by name.
    :return: Percentage points above the target, by text and layer.
    """
    model = sparsify_activations(work.model, work.batches, targets, algorithm=algorithm)
    try:
        reports = {where: measure_sparsity(model, batches) for where, batches in texts.items()}
    finally:
        remove_sparsifiers(model)
    return {
        where: {x.name: to_points(x.sparsity - x.target_sparsity) for x in report.layers}
        for where, report in reports.items()
    }


def measure_nncf(work: Workload, targets: Any, texts: dict[str, list[Batch]]) -> dict[str, Deviations]:
    """
    Measure NNCF's masks.

    :param work: The model, left as it is, and the calibration batches.
    :param targets: Target sparsities, as we take them.
    :param texts: Batches to measure on, by name.
    :return: Percentage points above the target, by text and layer.
    """
    layer_names = find_layer_names(work.model, work.batches[0])
    translated = translate_targets(work.model, work.batches[0], targets)
    model = sparsify_with_nncf(copy.deepcopy(work.model), work.batches, translated)
    asked = {name: sparsifier.target_sparsity for name, sparsifier in named_nncf_sparsifiers(model).items()}
    deviations: dict[str, Deviations] = {}
    for where, batches in texts.items():
        with count_nncf_zeros(model) as shares:
            run_batches(model, batches, total=len(batches), description="measuring NNCF's sparsity")
        measured = shares()
        deviations[where] = {layer_names[node]: to_points(measured[node] - target) for node, target in asked.items()}
    return deviations


def to_points(difference: float) -> float:
    """
    Express a difference of shares in percentage points.

    :param difference: The difference.
    :return: The points, to a ten-thousandth.
    """
    return round(100 * difference, 4)


def make_bars(title: str, where: str, found: dict[str, dict[str, Deviations]]) -> list[Bar]:
    """
    Judge the layer that is farthest from its target.

    :param title: The setting.
    :param where: The text.
    :param found: Deviations by side, text and layer.
    :return: The figures; bars are for `magnitude`.
    """
    bars = []
    for side, by_text in found.items():
        sizes = [abs(points) for points in by_text[where].values()]
        beyond = sum(size > BARS[where] for size in sizes)
        note = f"mean {sum(sizes) / len(sizes):.2g}; {beyond} of {len(sizes)} layers beyond {BARS[where]:g}"
        if side == "magnitude" and NNCF in found:
            note += f"; NNCF's farthest {max(map(abs, found[NNCF][where].values())):.2g}"
        limit = BARS[where] if side == "magnitude" else None
        bars.append(Bar(f"{title}, {side}, {where}: farthest layer", max(sizes), limit, unit="points", note=note))
    return bars


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_parser("Measure how far each layer's sparsity is from its target.")
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=list(SETTINGS), help="target sparsities")
    parser.add_argument("--eval-batches", type=positive, default=16, help="how many batches of WikiText")
    parser.add_argument("--eval-length", type=positive, default=512, help="tokens in each of them")
    parser.add_argument("--no-nncf", action="store_true", help="leave NNCF's own masks out; they take minutes")
    return run_benchmark("target_met", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
