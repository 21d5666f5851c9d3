"""
Measure how calibration's time and memory grow with tokens, layers and width, on Llamas with random weights.

    python benchmarks/cost_curves.py --json cost_curves.json --plot cost_curves.png

Each point is a process of its own. Slopes are those of straight lines through the logarithms: 1 is proportional growth,
0 none.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bars import Bar, Measurement
from calibration_memory import forget_peak
from command import announce, make_plain_parser, run_benchmark
from transformers import LlamaConfig, LlamaForCausalLM

from actsparse import sparsify_activations
from actsparse.errors import ActsparseError
from actsparse.runtime.environment import peak_memory

ALGORITHMS = ("magnitude", "auto")
LENGTH = 256  # tokens in a batch
VOCABULARY = 4096
FORWARD = "forward"


@dataclass(frozen=True)
class Point:
    """
    A model and an amount of data.

    :param batches: Batches of `LENGTH` tokens.
    :param layers: Blocks.
    :param width: Hidden size.
    """

    batches: int = 8
    layers: int = 4
    width: int = 512


# What grows, and the most that its slope may be: time is proportional to tokens and to weights, of which a layer has as
# many as the next, and which grow with the square of the width.
CURVES = {
    "tokens": ([Point(batches=b) for b in (4, 16, 64, 256)], lambda p: p.batches * LENGTH, 1.1),
    "layers": ([Point(layers=n) for n in (2, 8, 32, 128)], lambda p: p.layers, 1.1),
    "width": ([Point(width=w) for w in (256, 512, 1024, 2048, 4096)], lambda p: p.width, 2.1),
}


def measure(options: argparse.Namespace) -> Measurement:
    """
    Measure all points and fit lines.

    :param options: The options.
    :return: The slopes.
    """
    found: dict[Point, dict[str, Any]] = {}
    for points, _, _ in CURVES.values():
        for point in points:
            if point not in found:
                announce(f"{point.batches} batches, {point.layers} layers, width {point.width}")
                found[point] = run_worker(point)
    bars, samples = [], {}
    for name, (points, grows, most) in CURVES.items():
        sizes = [grows(point) for point in points]
        for algorithm in ALGORITHMS:
            seconds = [found[point][algorithm]["seconds"] for point in points]
            memory = [found[point][algorithm]["extra_bytes"] for point in points]
            note = f"{seconds[0]:.1f} to {seconds[-1]:.1f} s, {sizes[0]} to {sizes[-1]}"
            bars.append(Bar(f"{algorithm}: seconds against {name}, slope", slope(sizes, seconds), most, note=note))
            note = f"{memory[0] / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB beyond the model"
            limit = 0.1 if name == "tokens" else None
            bars.append(Bar(f"{algorithm}: memory against {name}, slope", slope(sizes, memory), limit, note=note))
        samples[name] = [{**vars(point), **found[point]} for point in points]
    ratios = {a: [x[a]["seconds"] / x[FORWARD]["seconds"] for x in found.values()] for a in ALGORITHMS}
    for algorithm, values in ratios.items():
        note = f"{min(values):.2f} to {max(values):.2f}"
        bars.append(Bar(f"{algorithm}: seconds over those of the forward passes", float(np.median(values)), note=note))
    if options.plot:
        draw(samples, options.plot)
    settings = {"length": LENGTH, "vocabulary": VOCABULARY, "target": 0.5, "dtype": "float32"}
    return Measurement(tuple(bars), settings, samples)


def slope(sizes: Iterable[float], values: Iterable[float]) -> float:
    """
    Fit a power.

    :param sizes: What grows.
    :param values: What grows with it.
    :return: The exponent.
    """
    # A megabyte more or less is noise of the allocator.
    return float(np.polyfit(np.log(list(sizes)), np.log([max(value, 1e-3) for value in values]), 1)[0])


def run_worker(point: Point) -> dict[str, Any]:
    """
    Measure a point in a process of its own.

    :param point: The point.
    :return: What the process reported.
    :raises ActsparseError: If it failed; carries its last line.
    """
    command = [sys.executable, __file__, "--point", *map(str, vars(point).values())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        msg = f"measuring {point} failed: {last}"
        raise ActsparseError(msg)
    return json.loads(done.stdout.splitlines()[-1])


def measure_point(point: Point) -> dict[str, Any]:
    """
    Run forwards and each algorithm here.

    :param point: The point.
    :return: Seconds of each, and the memory that each takes beyond what is there when it starts.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=point.width,
        intermediate_size=point.width * 11 // 4 // 64 * 64,
        num_hidden_layers=point.layers,
        num_attention_heads=point.width // 64,
        num_key_value_heads=max(1, point.width // 256),
    )
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(VOCABULARY, (1, LENGTH))} for _ in range(point.batches)]
    found: dict[str, Any] = {}
    with torch.no_grad():
        model(**batches[0])
        start = time.perf_counter()
        for batch in batches:
            model(**batch)
        found[FORWARD] = {"seconds": time.perf_counter() - start}
    for algorithm in ALGORITHMS:
        return_free_memory()
        forget_peak()
        before, start = peak_memory(), time.perf_counter()
        sparsify_activations(model, batches, 0.5, algorithm=algorithm)
        found[algorithm] = {"seconds": time.perf_counter() - start, "extra_bytes": peak_memory() - before}
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return found


def return_free_memory() -> None:
    """Return what the allocator holds but nobody uses, in which the next measurement would hide (glibc)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def draw(samples: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """
    Draw seconds and memory against what grows.

    :param samples: The points of each curve.
    :param path: The PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(4 * len(samples), 6), layout="constrained")
    panels = figure.subplots(2, len(samples), squeeze=False)
    for column, (name, points) in enumerate(samples.items()):
        sizes = [point["batches"] * LENGTH if name == "tokens" else point[name] for point in points]
        for number, side in enumerate((FORWARD, *ALGORITHMS)):
            style = {"marker": "o", "color": f"C{number}", "label": side}
            panels[0][column].loglog(sizes, [point[side]["seconds"] for point in points], **style)
            if side != FORWARD:
                panels[1][column].loglog(sizes, [point[side]["extra_bytes"] / 1e6 for point in points], **style)
        panels[0][column].set(title=name, ylabel="seconds" if column == 0 else "")
        for panel in panels[:, column]:
            panel.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
            panel.xaxis.set_minor_locator(NullLocator())
        panels[1][column].set(xlabel=name, ylabel="MB beyond the model" if column == 0 else "")
    for panel in panels.flat:
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Measure how calibration's time and memory grow.")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    parser.add_argument("--point", nargs=3, type=int, help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args(arguments)
    if options.point:
        print(json.dumps(measure_point(Point(*options.point))))
        return 0
    return run_benchmark("cost_curves", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
