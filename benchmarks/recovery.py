"""
Recover a model masked by `auto`, and compare with `magnitude` without recovery, at equal measured sparsity on WikiText.

    python benchmarks/recovery.py --out DIR [--steps 100] [--json recovery.json]

Beside it stand the recovered weights without masks, and the dense model trained for as many steps on the same text:
what is recovery, and what is the text. The dense model learns next tokens, because its own predictions, which recovery
learns, have nothing to teach it. The points that need no recovery are those of `frontier.py`, and are taken from its
folder; what is trained here is kept there, too.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from bars import Bar, Measurement
from command import announce, positive, run_benchmark
from frontier import OURS, UNIFORM, increases, make_points_parser, summarize
from workload import find_wikitext

from actsparse.commands.common import CALIBRATION_LENGTH
from actsparse.commands.sweep import Point, SweepJob, run_sweep
from actsparse.console.report import write_json
from actsparse.evaluation.bootstrap import bootstrap_ratio
from actsparse.evaluation.comparison import compare_with_dense
from actsparse.models import load_model
from actsparse.recovery import recover
from actsparse.recovery.recover import LARGEST_GRADIENT, RATES, learning_rate
from actsparse.runtime.progress import progress_bar
from actsparse.sparsify import sparsify_activations
from actsparse.texts import load_pages, take_batches, token_batches
from actsparse.torch.wrappers import named_linears

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
    recovered = once(options, "recovered", lambda: train_masked(options, ours["target"], pages))
    control = once(options, "control", lambda: train_dense(options, pages))
    return Measurement(
        tuple(make_bars(ours, uniform, recovered, control)),
        sweep.settings | {"steps": options.steps, "tokens a step": BATCH * CALIBRATION_LENGTH},
        {"recovered": summarize(recovered), "control": summarize(control)},
    )


def once(options: argparse.Namespace, name: str, train: Callable[[], Point]) -> Point:
    """
    Train what has not been trained before.

    :param options: The options.
    :param name: What it is called.
    :param train: Trains it.
    :return: What was measured of it, now or earlier.
    """
    path = options.out / f"{name}-{options.steps}-{options.learning_rate}-{options.pages}.json"
    if not path.is_file():
        write_json(path, train())
    return json.loads(path.read_bytes())


def train_masked(options: argparse.Namespace, target: float, pages: Sequence[str]) -> Point:
    """
    Mask a fresh model, train it on its own dense predictions, and compare it with itself without masks.

    :param options: The options.
    :param target: The target sparsity.
    :param pages: The evaluation text.
    :return: The comparison, and how many seconds the training took.
    """
    loaded = load_model(options.model)
    calibration = load_pages("default", purpose="calibration")
    batches = token_batches(loaded.tokenizer, calibration, num_batches=32, length=CALIBRATION_LENGTH)
    announce(f"masking with {OURS} at {target:.3f}, then {options.steps} steps")
    sparsify_activations(loaded.model, batches, target, algorithm=OURS)
    data = load_training(options, loaded.tokenizer)
    done = recover(
        loaded.model,
        data[:-HELD_OUT],
        held_out=data[-HELD_OUT:],
        steps=options.steps,
        learning_rate=options.learning_rate,
        batches_per_step=1,
    )
    announce(f"held-out divergence {done.before.divergence:.4f} to {done.best.divergence:.4f} in {done.seconds:.0f} s")
    compared = compare_with_dense(loaded.model, loaded.tokenizer, pages, max_length=WINDOW)
    return compared.to_dict() | {"training_seconds": done.seconds}


def train_dense(options: argparse.Namespace, pages: Sequence[str]) -> Point:
    """
    Train a fresh model without masks on next tokens, as recovery trains: the same data, steps, rates and layers.

    :param options: The options.
    :param pages: The evaluation text.
    :return: The comparison of the model, as `sparse`, with itself.
    """
    loaded = load_model(options.model)
    model = loaded.model
    announce(f"training without masks, {options.steps} steps")
    data = load_training(options, loaded.tokenizer)[:-HELD_OUT]
    layers = [module for name, module in named_linears(model) if ".layers." in name]
    weights = [layer.weight.requires_grad_() for layer in layers if isinstance(layer.weight, torch.nn.Parameter)]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    highest = options.learning_rate or RATES["whole"]
    with progress_bar("training", total=options.steps, unit="steps") as advance:
        for step in range(options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, highest)
            ids = data[step % len(data)]["input_ids"]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, LARGEST_GRADIENT)
            optimizer.step()
            advance(1)
    return compare_with_dense(model.eval(), loaded.tokenizer, pages, max_length=WINDOW).to_dict()


def load_training(options: argparse.Namespace, tokenizer: Any) -> list[Any]:
    """
    Load the text that is trained on, and at its end what is held out.

    :param options: The options.
    :param tokenizer: The model's.
    :return: Batches.
    """
    text = load_pages("default", purpose="training")
    return take_batches(
        tokenizer, text, most=options.steps + HELD_OUT, length=CALIBRATION_LENGTH, batch_size=BATCH
    )  # fmt: skip


def make_bars(ours: Point, uniform: Point, recovered: Point, control: Point) -> list[Bar]:
    """
    Compare with the dense model that all of them come from.

    :param ours: `auto` without recovery.
    :param uniform: `magnitude`.
    :param recovered: `auto` after recovery, beside the recovered weights without masks.
    :param control: A model without masks, trained on next tokens.
    :return: The bars.
    """
    dense, tokens = np.array(uniform["dense_window_losses"]), sum(uniform["window_tokens"])
    loss = np.array(recovered["window_losses"]) - dense
    ratio = float(loss.sum() / increases(uniform).sum())
    low, high = bootstrap_ratio(loss, increases(uniform))
    note = f"{loss.sum() / tokens:.3f} / {uniform['loss_increase']:.3f}; 95% {low:.2f} to {high:.2f}; at "
    note += f"{100 * recovered['measured_sparsity']:.1f} / {100 * uniform['measured_sparsity']:.1f}%"
    unmasked = float((np.array(recovered["dense_window_losses"]) - dense).sum() / tokens)
    trained = float((np.array(control["window_losses"]) - dense).sum() / tokens)
    return [
        Bar("loss of auto after recovery over magnitude", ratio, MAX_RATIO, note=note),
        Bar("loss of auto over magnitude", ours["loss_increase"] / uniform["loss_increase"]),
        Bar("recovery", recovered["training_seconds"] / 60, MAX_MINUTES, unit="minutes"),
        Bar("loss of the recovered weights without masks", unmasked, note="nats a token more than before"),
        Bar("loss of the dense model trained on the same text", trained, note="nats a token more than before"),
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
