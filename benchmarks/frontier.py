"""
Compare algorithms at equal measured sparsity on WikiText, on several real models: the perplexity lost, and intervals.

    python benchmarks/frontier.py --out DIR [--models default qwen] [--settings all ffn int8] [--json frontier.json]

Every point is a file in the folder and is not measured again: an interrupted run goes on. What is compared is
log(perplexity sparse / perplexity dense) per token; the bar is `auto`'s over that of another algorithm. A model that
cannot be had is left out, and the reason is told. Small models lose by chance more or less text with each calibration:
--draws calibrates several times, on other pages of C4, and compares what all draws lose together.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from real_models import REAL_MODELS, RealModel, cut_windows, write_pages
from workload import find_wikitext

from actsparse.commands.sweep import Point, Sweep, SweepJob, run_sweep
from actsparse.errors import SourceError
from actsparse.evaluation.bootstrap import bootstrap_ratio
from actsparse.texts import load_pages

OURS, UNIFORM, GREEDY = "auto", "magnitude", "teal"
FFN = ("ffn.gate", "ffn.up", "ffn.down")
# Windows of text that begins with BOS; the others are cut out of whole pages.
WINDOWS = 32
# So many draws of 32 x 256 tokens fit into the packaged calibration text without common pages.
DRAWS = 6
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
            sweeps = [sweep_setting(options, setting, name, model, source, draw) for draw in range(options.draws)]
            bars += make_bars(title, setting.bars[name], sweeps)
            samples[title] = [summarize(point) for sweep in sweeps for point in sweep.points]
            # Where it lies here is nobody's business.
            settings["models"][name] = sweeps[0].settings | {"model": model.title}
    return Measurement(tuple(bars), settings, samples)


def sweep_setting(
    options: argparse.Namespace, setting: Setting, name: str, model: RealModel, source: str, draw: int
) -> Sweep:
    """
    Measure what is missing of one setting.

    :param options: The options.
    :param setting: The setting.
    :param name: The model's name.
    :param model: The model.
    :param source: Where it is.
    :param draw: Which draw of the calibration text; 0 is the text as it is.
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
        out=out / f"draw-{draw + 1}" if draw else out,
        calibration=turn_pages(draw, out) if draw else "default",
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


def turn_pages(draw: int, out: Path) -> str:
    """
    Write the calibration text with other pages first.

    :param draw: Which draw.
    :param out: A folder for the file.
    :return: The file, a text source.
    """
    pages = load_pages("default", purpose="calibration").pages
    ends = np.cumsum([len(page) for page in pages])
    first = int(np.searchsorted(ends, ends[-1] * draw / DRAWS))
    path = out / f"calibration-{draw + 1}.jsonl"
    write_pages(path, pages[first:] + pages[:first])
    return str(path)


def make_bars(title: str, limits: Bars, draws: Sequence[Sweep]) -> list[Bar]:
    """
    Compare `auto` with the others.

    :param title: What tables call the setting.
    :param limits: What is to be reached.
    :param draws: Its points, once for each draw of the calibration text.
    :return: A bar for uniform and for greedy, a figure for the rest.
    """
    bars = []
    for sparsity in draws[0].sparsities:
        own = f"{title} {100 * sparsity:.0f}%"
        points = {
            name: [point for sweep in draws for point in sweep.at(sparsity) if point["algorithm"] == name]
            for name in dict.fromkeys(point["algorithm"] for point in draws[0].at(sparsity))
        }
        ours = points.pop(OURS)
        limit_of = dict(zip((UNIFORM, GREEDY), limits[sparsity], strict=True))
        for name, others in points.items():
            loss, other = mean(ours, "loss_increase"), mean(others, "loss_increase")
            low, high = bootstrap_ratio(increases(ours), increases(others))
            note = f"{loss:.3f} / {other:.3f}; 95% {low:.2f} to {high:.2f}; at "
            note += f"{100 * mean(ours, 'measured_sparsity'):.1f} / {100 * mean(others, 'measured_sparsity'):.1f}%"
            if len(draws) > 1:
                single = [a["loss_increase"] / b["loss_increase"] for a, b in zip(ours, others, strict=True)]
                note += f"; draws {', '.join(f'{ratio:.2f}' for ratio in single)}"
            bars.append(Bar(f"{own}: loss of {OURS} over {name}", loss / other, limit_of.get(name), note=note))
            moved, other = mean(ours, "kl_divergence"), mean(others, "kl_divergence")
            note = f"{moved:.3f} / {other:.3f} nats from the dense model's predictions"
            bars.append(Bar(f"{own}: divergence of {OURS} over {name}", moved / other, note=note))
        bars.append(Bar(f"{own}: calibration of {OURS}", mean(ours, "calibration_seconds"), unit="s"))
    return bars


def mean(points: Sequence[Point], figure: str) -> float:
    """
    Average a figure.

    :param points: The draws' points.
    :param figure: Its name.
    :return: The mean.
    """
    return fmean(point[figure] for point in points)


def increases(points: Sequence[Point]) -> np.ndarray:
    """
    Read what is lost, window by window.

    :param points: The draws' points.
    :return: Loss increase of each window, summed over its tokens and the draws.
    """
    return np.sum([np.array(x["window_losses"]) - np.array(x["dense_window_losses"]) for x in points], axis=0)


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
    draws = range(1, DRAWS + 1)
    parser.add_argument("--draws", type=int, choices=draws, default=1, help="calibrations, each on other pages")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what to compare")
    parser.add_argument("--sparsities", nargs="+", type=float, help="only these of each setting")
    parser.add_argument("--algorithms", nargs="+", default=[OURS, UNIFORM, GREEDY, "nncf", "fisher"], help="which")
    return run_benchmark("frontier", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
