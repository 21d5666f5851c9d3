"""
Plant a regression and see that it is caught, and that noise is not.

    python benchmarks/planted_regression.py --json planted_regression.json

The regression is thresholds 1.05 times what they should be; the noise, calibration on ten other draws of windows. That
is more than `actsparse regress` ever has to let pass: to it, another seed is another case. Case and tolerances are
those of examples/regression; the figures compared with are measured here, with the case's own seed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bars import ROOT, Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark

from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.compare import REGRESSION, Difference, compare_case
from actsparse.commands.regression.figures import DENSE, SPARSE, CaseResult, Windows, loss_figures
from actsparse.commands.regression.inputs import Inputs, find_inputs
from actsparse.commands.regression.measure import sparsity_figures
from actsparse.commands.regression.prepare import CaseModel, calibration_windows, prepare_model
from actsparse.commands.regression.reference import ReferenceCase, Tolerance, accept_figures, read_reference
from actsparse.evaluation.comparison import compare_losses
from actsparse.evaluation.word_perplexity import count_words
from actsparse.torch.insertion import named_sparsifiers

REFERENCE = ROOT / "examples" / "regression" / "reference.yaml"
NOISE, PLANTED = "noise", "thresholds x 1.05"
FACTOR = 1.05

Found = dict[str, dict[int, tuple[Difference, ...]]]


def measure(options: argparse.Namespace) -> Measurement:
    """
    Measure noise and planted regression for every seed.

    :param options: The options.
    :return: How many seeds are called a regression.
    """
    reference = read_reference(REFERENCE)
    name = next(iter(reference.cases))
    case = read_case(reference.case_path(name))
    inputs = find_inputs(case)
    model = prepare_model(case, inputs, announce)
    seeds = range(case.seed + 1, case.seed + 1 + options.seeds)
    found = plant(model, inputs, reference.find(name).tolerances, seeds)
    settings = inputs.describe(case) | {"seeds": options.seeds, "factor": FACTOR}
    samples = {
        kind: {str(seed): [describe(difference) for difference in seen] for seed, seen in by_seed.items()}
        for kind, by_seed in found.items()
    }
    return Measurement(make_bars(found), settings, samples)


def plant(model: CaseModel, inputs: Inputs, tolerances: Mapping[str, Tolerance | None], seeds: Sequence[int]) -> Found:
    """
    Compare every seed's figures with those of the case's own, as they are and with raised thresholds.

    :param model: A torch model and its data; comes back masked.
    :param inputs: Its texts.
    :param tolerances: How much worse each figure may become.
    :param seeds: The seeds.
    :return: The differences by kind and seed.
    """
    model.sparsify()
    first, dense = score(model, None)
    accepted = ReferenceCase("case.yaml", "case.json", accept_figures(first.figures, tolerances))
    found: Found = {NOISE: {}, PLANTED: {}}
    for seed in seeds:
        announce(f"seed {seed}")
        model.batches = calibration_windows(model.tokenizer, inputs.calibration, model.case.calibration, seed)
        model.sparsify()
        found[NOISE][seed] = compare_case(accepted, first, score(model, dense)[0])
        for _, sparsifier in named_sparsifiers(model.model):
            sparsifier.set_threshold(FACTOR * sparsifier.threshold)
        found[PLANTED][seed] = compare_case(accepted, first, score(model, dense)[0])
    return found


def score(model: CaseModel, dense: np.ndarray | None) -> tuple[CaseResult, np.ndarray]:
    """
    Measure loss and sparsity of a masked model.

    :param model: The model.
    :param dense: The windows' losses without masks, where they are known.
    :return: The figures, and those losses.
    """
    pages, length = model.pages, model.max_length
    losses = compare_losses(model.model, model.tokenizer, pages, max_length=length, dense=dense)
    sides = {DENSE: tuple(losses.dense.tolist()), SPARSE: tuple(losses.sparse.tolist())}
    windows = Windows(count_words(pages), tuple(losses.tokens.tolist()), sides)
    figures = loss_figures(windows) | sparsity_figures(losses.sparsity)
    return CaseResult(model.case.name, {}, figures, {}, windows), losses.dense


def make_bars(found: Found) -> tuple[Bar, ...]:
    """
    Judge the verdicts.

    :param found: The differences by kind and seed.
    :return: How many seeds are called a regression, of all and by figure.
    """
    bars = []
    for kind, by_seed in found.items():
        caught = [any(d.verdict == REGRESSION for d in seen) for seen in by_seed.values()]
        limit = float(len(by_seed)) if kind == PLANTED else 0.0
        title = f"{kind}: seeds called a regression"
        bars.append(Bar(title, float(sum(caught)), limit, kind == PLANTED, note=f"of {len(by_seed)}"))
        for name in dict.fromkeys(d.name for seen in by_seed.values() for d in seen if d.tolerance is not None):
            rows = [d for seen in by_seed.values() for d in seen if d.name == name]
            bars.append(
                Bar(f"{title}, by {name}", float(sum(d.verdict == REGRESSION for d in rows)), note=spread(rows))
            )
    return tuple(bars)


def spread(rows: Sequence[Difference]) -> str:
    """
    Say how far a figure's changes go.

    :param rows: Its difference at every seed.
    :return: The least and the largest change, of a loss the least and the largest end of its interval.
    """
    ends = [end for row in rows for end in row.change]
    return f"changes of {min(ends):+.4f} to {max(ends):+.4f}"


def describe(difference: Difference) -> dict[str, Any]:
    """
    Turn a difference into what JSON can hold.

    :param difference: The difference.
    :return: Figure, value, change and verdict.
    """
    change = [round(end, 6) for end in difference.change]
    return {"figure": difference.name, "now": difference.now.value, "change": change, "verdict": difference.verdict}


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Plant a regression over several seeds: it must be caught, and noise must not be.")
    parser.add_argument("--seeds", type=positive, default=10, help="how many seeds")
    return run_benchmark("planted_regression", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
