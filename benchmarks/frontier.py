"""
Compare algorithms at equal measured sparsity on WikiText: the perplexity lost, with paired bootstrap intervals.

    python benchmarks/frontier.py --out DIR [--settings all ffn int8] [--json frontier.json]

Every point is a file in the folder and is not measured again: an interrupted run goes on. What is compared is
log(perplexity sparse / perplexity dense) per token; the bar is `auto`'s over that of another algorithm.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from workload import find_wikitext

from actsparse.evaluation.bootstrap import bootstrap_ratio
from actsparse.sweep import Point, Sweep, SweepJob, run_sweep

OURS, UNIFORM, GREEDY = "auto", "magnitude", "teal"
FFN = ("ffn.gate", "ffn.up", "ffn.down")


class Setting(NamedTuple):
    """Which layers, how sparse, which weights, and what `auto` has to reach beside uniform and greedy."""

    title: str
    bars: dict[float, tuple[float | None, float | None]]
    roles: tuple[str, ...] = ()
    int8: str | None = None
    # Compressed blocks cannot run alone: the greedy allocation has no figure there.
    has_greedy: bool = True


SETTINGS = {
    "all": Setting("all", {0.5: (0.75, 0.9), 0.4: (0.8, 0.92), 0.6: (0.8, 0.92)}),
    "ffn": Setting("FFN", {0.5: (0.8, 0.92)}, roles=FFN),
    "int8": Setting("all, INT8", {0.5: (1.0, None)}, int8="asym", has_greedy=False),
}


def measure(options: argparse.Namespace) -> Measurement:
    """
    Sweep each setting.

    :param options: The options.
    :return: The ratios.
    """
    bars: list[Bar] = []
    samples: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name in options.settings:
        setting = SETTINGS[name]
        sweep = sweep_setting(options, setting)
        bars += make_bars(setting, sweep)
        samples[setting.title] = [summarize(point) for point in sweep.points]
        settings |= sweep.settings
    return Measurement(tuple(bars), settings | {"settings": list(options.settings)}, samples)


def sweep_setting(options: argparse.Namespace, setting: Setting) -> Sweep:
    """
    Measure what is missing of one setting.

    :param options: The options.
    :param setting: The setting.
    :return: Its points.
    """
    algorithms = [name for name in options.algorithms if setting.has_greedy or name != GREEDY]
    sparsities = [s for s in setting.bars if not options.sparsities or s in options.sparsities]
    job = SweepJob(
        model=options.model,
        out=options.out,
        algorithms=tuple(algorithms),
        sparsities=tuple(sparsities),
        roles=setting.roles,
        int8=setting.int8,
        text=str(options.evaluation or find_wikitext()),
        num_pages=options.pages,
    )
    return run_sweep(job, announce)


def make_bars(setting: Setting, sweep: Sweep) -> list[Bar]:
    """
    Compare `auto` with the others.

    :param setting: The setting.
    :param sweep: Its points.
    :return: A bar for uniform and for greedy, a figure for the rest.
    """
    bars = []
    for sparsity in sweep.sparsities:
        title = f"{setting.title} {100 * sparsity:.0f}%"
        points = {point["algorithm"]: point for point in sweep.at(sparsity)}
        ours = points.pop(OURS)
        limits = dict(zip((UNIFORM, GREEDY), setting.bars[sparsity], strict=True))
        for name, point in points.items():
            ratio = ours["loss_increase"] / point["loss_increase"]
            low, high = bootstrap_ratio(increases(ours), increases(point))
            note = f"{ours['loss_increase']:.3f} / {point['loss_increase']:.3f}; 95% {low:.2f} to {high:.2f}; at "
            note += f"{100 * ours['measured_sparsity']:.1f} / {100 * point['measured_sparsity']:.1f}%"
            bars.append(Bar(f"{title}: loss of {OURS} over {name}", ratio, limits.get(name), note=note))
        bars.append(Bar(f"{title}: calibration of {OURS}", ours["calibration_seconds"], unit="s"))
    return bars


def increases(point: Point) -> np.ndarray:
    """
    Read what a point loses, window by window.

    :param point: The point.
    :return: Summed loss increase of each window.
    """
    return np.array(point["window_losses"]) - np.array(point["dense_window_losses"])


def summarize(point: Point) -> dict[str, Any]:
    """
    Leave out what is long.

    :param point: A point.
    :return: Its figures without those of single windows and layers.
    """
    return {name: value for name, value in point.items() if not isinstance(value, list) or len(value) < 4}


def make_points_parser(description: str) -> argparse.ArgumentParser:
    """
    Make a parser for a benchmark that keeps the points of a sweep in a folder.

    :param description: What the benchmark does.
    :return: The parser, to add the benchmark's own options to.
    """
    parser = make_plain_parser(description)
    parser.add_argument("--out", type=Path, default=Path("frontier-points"), help="folder of the points")
    parser.add_argument("--model", default="default", help="hub id, folder, GGUF file or default")
    parser.add_argument("--evaluation", help="evaluation text, if not WikiText's test split")
    parser.add_argument("--pages", type=positive, default=4, help="pages of it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code.
    """
    parser = make_points_parser("Compare algorithms at equal measured sparsity on WikiText.")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what to compare")
    parser.add_argument("--sparsities", nargs="+", type=float, help="only these of each setting")
    parser.add_argument("--algorithms", nargs="+", default=[OURS, UNIFORM, GREEDY, "nncf", "fisher"], help="which")
    return run_benchmark("frontier", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
