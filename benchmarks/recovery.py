"""
Recover a model masked by `auto`, and compare with `magnitude` without recovery, at equal measured sparsity on WikiText.

    python benchmarks/recovery.py --out DIR [--steps 100] [--json recovery.json]

Beside it stand the recovered weights without masks, and a model trained alike without any mask: what is recovery, and
what is the text. The points that need no recovery are those of `frontier.py`, and are taken from its folder.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from command import announce, positive, run_benchmark
from frontier import OURS, UNIFORM, increases, make_points_parser
from report import Bar, Measurement
from workload import find_wikitext

from actsparse.demo import CALIBRATION_LENGTH
from actsparse.evaluation.bootstrap import bootstrap_ratio
from actsparse.evaluation.comparison import Comparison, compare_with_dense
from actsparse.models import load_model
from actsparse.recovery import recover
from actsparse.sparsify import sparsify_activations
from actsparse.sweep import Point, SweepJob, run_sweep
from actsparse.texts import load_pages, take_batches, token_batches

SPARSITY = 0.5
BATCH = 4
HELD_OUT = 3
MAX_RATIO = 0.55
MAX_MINUTES = 15.0
WINDOW = 512


def measure(options: argparse.Namespace) -> Measurement:
    """
    Sweep, recover, and train the control.

    :param options: The options.
    :return: The ratios.
    """
    text = str(options.evaluation or find_wikitext())
    job = SweepJob(
        model=options.model,
        out=options.out,
        algorithms=(OURS, UNIFORM),
        sparsities=(SPARSITY,),
        text=text,
        num_pages=options.pages,
    )
    sweep = run_sweep(job, announce)
    ours, uniform = sweep.points
    pages = load_pages(text, num_pages=options.pages).pages
    recovered, seconds = train(options, OURS, ours["target"], pages)
    control, _ = train(options, UNIFORM, 0.0, pages)
    return Measurement(
        tuple(make_bars(ours, uniform, recovered, control, seconds)),
        sweep.settings | {"steps": options.steps, "tokens a step": BATCH * CALIBRATION_LENGTH},
        {"recovered": recovered.to_dict(), "control": control.to_dict()},
    )


def train(options: argparse.Namespace, algorithm: str, target: float, pages: Sequence[str]) -> tuple[Comparison, float]:
    """
    Mask a fresh model, train it on its own dense predictions, and compare it with itself without masks.

    :param options: The options.
    :param algorithm: The algorithm.
    :param target: The target sparsity; 0 for masks that pass everything.
    :param pages: The evaluation text.
    :return: The comparison, and how many seconds the training took.
    """
    loaded = load_model(options.model)
    calibration = load_pages("default", purpose="calibration")
    batches = token_batches(loaded.tokenizer, calibration, num_batches=32, length=CALIBRATION_LENGTH)
    announce(f"masking with {algorithm} at {target:.3f}, then {options.steps} steps")
    sparsify_activations(loaded.model, batches, target, algorithm=algorithm)
    data = take_batches(
        loaded.tokenizer,
        load_pages("default", purpose="training"),
        most=options.steps + HELD_OUT,
        length=CALIBRATION_LENGTH,
        batch_size=BATCH,
    )
    done = recover(
        loaded.model,
        data[:-HELD_OUT],
        held_out=data[-HELD_OUT:],
        steps=options.steps,
        learning_rate=options.learning_rate,
        batches_per_step=1,
    )
    announce(f"held-out divergence {done.before.divergence:.4f} to {done.best.divergence:.4f} in {done.seconds:.0f} s")
    return compare_with_dense(loaded.model, loaded.tokenizer, pages, max_length=WINDOW), done.seconds


def make_bars(ours: Point, uniform: Point, recovered: Comparison, control: Comparison, seconds: float) -> list[Bar]:
    """
    Compare with the dense model that all of them come from.

    :param ours: `auto` without recovery.
    :param uniform: `magnitude`.
    :param recovered: `auto` after recovery, beside the recovered weights without masks.
    :param control: A model without masks, trained alike.
    :param seconds: What recovery took.
    :return: The bars.
    """
    dense, tokens = np.array(uniform["dense_window_losses"]), recovered.tokens.sum()
    loss = recovered.sparse - dense
    ratio = loss.sum() / increases(uniform).sum()
    low, high = bootstrap_ratio(loss, increases(uniform))
    note = f"{loss.sum() / tokens:.3f} / {uniform['loss_increase']:.3f}; 95% {low:.2f} to {high:.2f}; at "
    note += f"{100 * recovered.sparsity.sparsity:.1f} / {100 * uniform['measured_sparsity']:.1f}%"
    return [
        Bar("loss of auto after recovery over magnitude", ratio, MAX_RATIO, note=note),
        Bar("loss of auto over magnitude", ours["loss_increase"] / uniform["loss_increase"]),
        Bar("recovery", seconds / 60, MAX_MINUTES, unit="minutes"),
        Bar("loss of the recovered weights without masks", (recovered.dense - dense).sum() / tokens),
        Bar("loss of a model trained alike without masks", (control.sparse - dense).sum() / tokens),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = make_points_parser("Recover a masked model, and compare at equal measured sparsity on WikiText.")
    parser.add_argument("--steps", type=positive, default=100, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, help="the highest of AdamW, if not recover's own choice")
    return run_benchmark("recovery", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
