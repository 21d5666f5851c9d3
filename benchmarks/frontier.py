"""
Compare algorithms at equal measured sparsity on WikiText, on several real models: the perplexity lost, and intervals.

    python benchmarks/frontier.py --out DIR [--models default qwen] [--settings all ffn int8] [--json frontier.json]

Every point is a file in the folder and is not measured again: an interrupted run goes on. What is compared is
log(perplexity sparse / perplexity dense) per token; the bar is `auto`'s over that of another algorithm. A model that
cannot be had is left out, and the reason is told.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from real_models import REAL_MODELS, RealModel, cut_windows
from workload import find_wikitext

from actsparse.errors import SourceError
from actsparse.evaluation.bootstrap import bootstrap_ratio
from actsparse.sweep import Point, Sweep, SweepJob, run_sweep

OURS, UNIFORM, GREEDY = "auto", "magnitude", "teal"
FFN = ("ffn.gate", "ffn.up", "ffn.down")
# Windows of text that begins with BOS; the others are cut out of whole pages.
WINDOWS = 32
# What `auto` has to reach beside uniform and greedy.
Bars = dict[float, tuple[float | None, float | None]]


class Setting(NamedTuple):
    """Which layers, how sparse, which weights."""

    title: str
    bars: dict[str, Bars]
    roles: tuple[str, ...] = ()
    int8: str | None = None
    # Compressed blocks cannot run alone: the greedy allocation has no figure there.
    has_greedy: bool = True


SETTINGS = {
    "all": Setting(
        "all",
        {
            "default": {0.3: (0.65, None), 0.4: (0.65, 0.92), 0.5: (0.65, 0.9), 0.6: (0.8, 0.92)},
            "qwen": {0.3: (0.5, None), 0.4: (0.55, None), 0.5: (0.65, None)},
            "gemma": {0.3: (0.85, None), 0.4: (0.8, None), 0.5: (0.8, None)},
            "gemma-no-bos": {0.3: (1.0, None), 0.4: (1.0, None), 0.5: (1.0, None)},
        },
    ),
    "ffn": Setting(
        "FFN",
        {"default": {0.5: (0.8, 0.92)}, "qwen": {0.5: (0.8, None)}, "gemma": {0.5: (0.8, None)}},
        roles=FFN,
    ),
    "int8": Setting("all, INT8", {"default": {0.5: (1.0, None)}}, int8="asym", has_greedy=False),
}


def measure(options: argparse.Namespace) -> Measurement:
    """
    Sweep each setting of each model.

    :param options: The options.
    :return: The ratios.
    """
    bars: list[Bar] = []
    samples: dict[str, Any] = {}
    settings: dict[str, Any] = {"settings": list(options.settings), "models": {}}
    for name in options.models:
        model = REAL_MODELS[name]
        if name == "default" and options.model != "default":
            model = RealModel(options.model, lambda: options.model)
        try:
            source = model.find()
        except SourceError as error:
            announce(f"{model.title} is left out: {error}")
            settings["models"][name] = f"left out: {error}"
            continue
        for setting in (SETTINGS[chosen] for chosen in options.settings):
            if name not in setting.bars:
                continue
            # The default model's figures are named as they always were.
            title = setting.title if name == "default" else f"{model.title}: {setting.title}"
            sweep = sweep_setting(options, setting, name, model, source)
            bars += make_bars(title, setting.bars[name], sweep)
            samples[title] = [summarize(point) for point in sweep.points]
            settings["models"][name] = sweep.settings
    return Measurement(tuple(bars), settings, samples)


def sweep_setting(options: argparse.Namespace, setting: Setting, name: str, model: RealModel, source: str) -> Sweep:
    """
    Measure what is missing of one setting.

    :param options: The options.
    :param setting: The setting.
    :param name: The model's name.
    :param model: The model.
    :param source: Where it is.
    :return: Its points.
    """
    algorithms = [x for x in options.algorithms if x != GREEDY or (setting.has_greedy and name == "default")]
    sparsities = [s for s in setting.bars[name] if not options.sparsities or s in options.sparsities]
    out = options.out if name == "default" else options.out / name
    text = str(options.evaluation or find_wikitext())
    if model.begins_with_bos:
        text = cut_windows(source, out, WINDOWS)
    job = SweepJob(
        model=source,
        out=out,
        algorithms=tuple(algorithms),
        sparsities=tuple(sparsities),
        roles=setting.roles,
        int8=setting.int8,
        dtype=model.dtype,
        num_batches=options.batches,
        text=text,
        num_pages=None if model.begins_with_bos else options.pages,
    )
    return run_sweep(job, announce)


def make_bars(title: str, limits: Bars, sweep: Sweep) -> list[Bar]:
    """
    Compare `auto` with the others.

    :param title: What tables call the setting.
    :param limits: What is to be reached.
    :param sweep: Its points.
    :return: A bar for uniform and for greedy, a figure for the rest.
    """
    bars = []
    for sparsity in sweep.sparsities:
        own = f"{title} {100 * sparsity:.0f}%"
        points = {point["algorithm"]: point for point in sweep.at(sparsity)}
        ours = points.pop(OURS)
        limit_of = dict(zip((UNIFORM, GREEDY), limits[sparsity], strict=True))
        for name, point in points.items():
            ratio = ours["loss_increase"] / point["loss_increase"]
            low, high = bootstrap_ratio(increases(ours), increases(point))
            note = f"{ours['loss_increase']:.3f} / {point['loss_increase']:.3f}; 95% {low:.2f} to {high:.2f}; at "
            note += f"{100 * ours['measured_sparsity']:.1f} / {100 * point['measured_sparsity']:.1f}%"
            bars.append(Bar(f"{own}: loss of {OURS} over {name}", ratio, limit_of.get(name), note=note))
            ratio = ours["kl_divergence"] / point["kl_divergence"]
            note = f"{ours['kl_divergence']:.3f} / {point['kl_divergence']:.3f} nats from the dense model's predictions"
            bars.append(Bar(f"{own}: divergence of {OURS} over {name}", ratio, note=note))
        bars.append(Bar(f"{own}: calibration of {OURS}", ours["calibration_seconds"], unit="s"))
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
    parser.add_argument("--model", default="default", help="hub id, folder or GGUF file in place of the default model")
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
    parser.add_argument("--models", nargs="+", choices=REAL_MODELS, default=["default"], help="which models")
    parser.add_argument("--batches", type=positive, default=32, help="calibration batches of 256 tokens")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what to compare")
    parser.add_argument("--sparsities", nargs="+", type=float, help="only these of each setting")
    parser.add_argument("--algorithms", nargs="+", default=[OURS, UNIFORM, GREEDY, "nncf", "fisher"], help="which")
    return run_benchmark("frontier", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
