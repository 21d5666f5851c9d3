"""
Bits and sparsity side by side: what each form of a model loses, and how fast it decodes on this machine.

    python benchmarks/pareto.py --folder FOLDER [--models default qwen gemma] [--json pareto.json] [--plot FOLDER]

OpenVINO's weights (INT8, INT4 without and with data), dense, dense on the kernel, and masked by `magnitude` and `auto`;
and llama.cpp's, all on the same windows of WikiText. Losses are nats of a token over the model's own weights. What the
folder has is not measured again: an interrupted run goes on.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp
from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from real_models import REAL_MODELS, RealModel, cut_windows
from workload import find_wikitext

from actsparse.commands.bench.prepare import AWARE, find_source
from actsparse.commands.tune.candidates import KERNEL, REFERENCE, Candidate, Speed
from actsparse.commands.tune.workshop import PROMPT_TOKENS, TIMED_TOKENS, WINDOW, Workshop
from actsparse.console.plot import plot_tradeoff
from actsparse.console.report import read_json, write_json
from actsparse.errors import ActsparseError
from actsparse.evaluation.bootstrap import bootstrap_ratio
from actsparse.evaluation.windows import WindowedText, measure_losses
from actsparse.models import load_model
from actsparse.runtime.environment import count_cores
from actsparse.texts import Text, load_pages

MODELS = ("default", "qwen", "gemma")
WEIGHTS = ("int8", "int4", AWARE)
ALGORITHMS = ("magnitude", "auto")
SPARSITIES = (0.2, 0.3, 0.4, 0.5)
GGUF = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q3_K_M")
LLAMA = "llama.cpp"
WINDOWS = 24
# Of several rounds of llama-bench the median counts, as of the tokens of the others.
REPETITIONS = 3
# Budgets of token perplexity, how much faster than the fastest dense form ours is to be within each, on which model.
BUDGETS = {0.01: 1.0, 0.03: 1.15, 0.1: 1.3}
JUDGED = "qwen"

Point = dict[str, Any]


def list_candidates(weights: str, algorithms: Sequence[str], sparsities: Sequence[float]) -> list[Candidate]:
    """
    List what is measured of one kind of weights.

    :param weights: The kind.
    :param algorithms: What finds masks.
    :param sparsities: Their targets.
    :return: The candidates, dense ones first.
    """
    masked = [Candidate(weights, KERNEL, algorithm, s) for algorithm in algorithms for s in sparsities]
    return [Candidate(weights), Candidate(weights, KERNEL), *masked]


def measure_openvino(workshop: Workshop, options: argparse.Namespace) -> list[Point]:
    """
    Measure what OpenVINO and the kernel run.

    :param workshop: Makes and measures candidates.
    :param options: The options.
    :return: The points.
    """
    points: list[Point] = []
    yardstick = Candidate(options.weights[0])
    tokens = workshop.windows().num_scored
    reference = workshop.losses(REFERENCE)
    for weights in options.weights:
        candidates = list_candidates(weights, options.algorithms, options.sparsities)
        more = {x: workshop.losses(x) - reference for x in candidates}
        # A few at a time, each beside the same one: so many compiled models do not fit into memory.
        speeds: dict[Candidate, Speed] = {}
        pace = None
        others = [x for x in candidates if x != yardstick]
        for first in range(0, len(others), options.together):
            timed = workshop.speeds([yardstick, *others[first : first + options.together]])
            pace = pace or timed[yardstick].decode
            scale = pace / timed[yardstick].decode
            for candidate, speed in timed.items():
                speeds.setdefault(candidate, speed.at_pace(scale))
        for candidate in candidates:
            low, high = bootstrap_ratio(more[candidate], tokens)
            speed = speeds[candidate]
            points.append(
                {
                    "name": candidate.name,
                    "group": weights if candidate.engine == KERNEL else f"OpenVINO {weights}",
                    "is_dense": candidate.engine != KERNEL,
                    "loss_increase": float(more[candidate].sum() / tokens.sum()),
                    "loss_increase_interval": [low, high],
                    "measured_sparsity": workshop.sparsity(candidate),
                    "decode_ms": speed.decode,
                    "first_token_ms": speed.first,
                    "precision": speed.precision,
                    **workshop.weigh(candidate, speed.precision),
                }
            )
    return points


def measure_llama(
    model: str,
    source: str,
    workshop: Workshop,
    text: Text,
    tools: Mapping[str, Path],
    folder: Path,
    kinds: Sequence[str],
) -> list[Point]:
    """
    Measure llama.cpp's files: their loss by our reader, which decompresses them, on the same windows.

    :param model: What the model is called.
    :param source: The GGUF file that they are made of.
    :param workshop: Gives the loss of the model's own weights.
    :param text: What they are judged by.
    :param tools: Builds of llama.cpp.
    :param folder: Where points are kept.
    :param kinds: Types of llama.cpp's.
    :return: The points.
    """
    points = []
    tokens, reference = workshop.windows().num_scored, workshop.losses(REFERENCE)
    for kind in kinds:
        path = folder / f"{LLAMA}-{model}-{kind}.json"
        point = read_json(path)
        if not isinstance(point, dict):
            file = llama_cpp.quantize(Path(source), kind, next(iter(tools.values())))
            announce(f"{model}: scoring {kind}")
            loaded = load_model(str(file))
            windows = WindowedText.of(loaded.model, loaded.tokenizer, text.pages, WINDOW)
            windows = WindowedText(windows.pages, windows.page_ids, windows.windows[:WINDOWS], windows.max_length)
            losses = measure_losses(loaded.model, windows, description=kind, is_finite=True)
            low, high = bootstrap_ratio(losses - reference, tokens)
            times = {build: time_llama(file, tools[build]) for build in tools}
            build = min(times, key=lambda name: times[name]["decode_ms"])
            point = {
                "name": f"{LLAMA} {kind}",
                "group": LLAMA,
                "is_dense": True,
                "loss_increase": float((losses - reference).sum() / tokens.sum()),
                "loss_increase_interval": [low, high],
                "measured_sparsity": 0.0,
                **times[build],
                "precision": build,
                "disk": file.stat().st_size,
                "peak": None,
            }
            write_json(path, point)
        points.append(point)
    return points


def time_llama(file: Path, tools: Path) -> dict[str, float]:
    """
    Time a file with one build of llama.cpp.

    :param file: The GGUF file.
    :param tools: The build.
    :return: Median milliseconds of a token and of a prompt's first one.
    """
    task = {"threads": count_cores(), "repetitions": REPETITIONS}
    decoded = llama_cpp.time_llama(tools, file, prompt=64, tokens=TIMED_TOKENS, **task)
    prompt = llama_cpp.time_llama(tools, file, prompt=PROMPT_TOKENS, **task)
    return {"decode_ms": median(decoded), "first_token_ms": median(prompt)}


def make_bars(name: str, title: str, points: Sequence[Point]) -> list[Bar]:
    """
    Compare the fastest masked and the fastest dense form within each budget.

    :param name: The model's name in `REAL_MODELS`.
    :param title: What tables call it.
    :param points: Its points.
    :return: The bars.
    """
    bars = []
    for budget, limit in BUDGETS.items():
        within = [point for point in points if point["loss_increase"] <= math.log1p(budget)]
        dense = min((x for x in within if x["is_dense"]), key=lambda x: x["decode_ms"], default=None)
        ours = min((x for x in within if not x["is_dense"]), key=lambda x: x["decode_ms"], default=None)
        if dense is None or ours is None:
            continue
        note = f"{ours['name']} at {1e3 / ours['decode_ms']:.0f} tokens/s over {dense['name']} at "
        note += f"{1e3 / dense['decode_ms']:.0f}; they cost {math.expm1(ours['loss_increase']):+.1%} and "
        note += f"{math.expm1(dense['loss_increase']):+.1%}"
        ratio = dense["decode_ms"] / ours["decode_ms"]
        own = f"{title}, within {budget:.0%} of perplexity: fastest of actsparse over fastest dense"
        bars.append(Bar(own, ratio, limit if name == JUDGED else None, is_minimum=True, note=note))
    return bars


def measure_model(name: str, model: RealModel, options: argparse.Namespace) -> list[Point]:
    """
    Measure one model.

    :param name: Its name in `REAL_MODELS`.
    :param model: The model.
    :param options: The options.
    :return: Its points.
    """
    source, folder = model.find(), options.folder / name
    text = load_pages(cut_windows(source, folder, WINDOWS) if model.begins_with_bos else find_wikitext())
    calibration = load_pages("default", purpose="calibration")
    workshop = Workshop(
        find_source(source), text, calibration, folder, num_batches=options.batches, windows=WINDOWS, say=announce
    )
    workshop.dense(REFERENCE.weights)
    points = measure_openvino(workshop, options)
    gguf = find_gguf(name, source)
    if options.gguf and gguf is not None:
        tools = llama_cpp.build_tools()
        smallest = llama_cpp.quantize(gguf, "Q8_0", next(iter(tools.values())))
        tools = llama_cpp.keep_running(tools, smallest, count_cores())
        points += measure_llama(name, str(gguf), workshop, text, tools, folder, options.gguf)
    return points


def find_gguf(name: str, source: str) -> Path | None:
    """
    Find the GGUF file that a model comes from.

    :param name: Its name in `REAL_MODELS`.
    :param source: What `load_model` takes.
    :return: The file; None where there is none.
    """
    from actsparse.storage.assets import fetch_model

    if name == "default":
        return fetch_model()
    path = Path(source)
    found = [path] if path.is_file() else sorted((path.parent / "gguf").glob("*.gguf"))
    return found[0] if found else None


def measure(options: argparse.Namespace) -> Measurement:
    """
    Measure all models.

    :param options: The options.
    :return: Every point, and the bars.
    """
    bars: list[Bar] = []
    samples: dict[str, list[Point]] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        for name in options.models:
            model = REAL_MODELS[name]
            try:
                points = measure_model(name, model, options)
            except ActsparseError as error:
                left_out[name] = str(error)
                announce(f"{model.title} is left out: {error}")
                continue
            samples[name] = points
            bars += [*make_figures(model.title, points), *make_bars(name, model.title, points)]
            if options.plot:
                drawn = [
                    {
                        **point,
                        "perplexity_increase": math.expm1(point["loss_increase"]),
                        "tokens_per_second": 1e3 / point["decode_ms"],
                        "is_chosen": False,
                    }
                    for point in points
                ]
                options.plot.mkdir(parents=True, exist_ok=True)
                plot_tradeoff(drawn, None, options.plot / f"pareto-{name}.png")
    if not samples:
        msg = f"no model can be had: {'; '.join(left_out.values())}"
        raise ActsparseError(msg)
    settings = {
        "windows": f"{WINDOWS} of {WINDOW}",
        "decoded": f"{TIMED_TOKENS} tokens",
        "prompt": PROMPT_TOKENS,
        "left out": left_out,
    }
    return Measurement(tuple(bars), settings, samples)


def make_figures(title: str, points: Sequence[Point]) -> list[Bar]:
    """
    Put points into the benchmark's table.

    :param title: What tables call the model.
    :param points: Its points.
    :return: A figure for each.
    """
    figures = []
    for point in points:
        low, high = point["loss_increase_interval"]
        note = f"{point['loss_increase']:+.4f} nats a token ({low:.4f} to {high:.4f})"
        note += f", {point['measured_sparsity']:.0%} sparse" if point["measured_sparsity"] else ""
        note += f", prompt of {PROMPT_TOKENS} in {point['first_token_ms']:.0f} ms, {point['disk'] / 1e6:.0f} MB"
        note += f", peak {point['peak'] / 1e6:.0f} MB" if point["peak"] else ""
        figures.append(Bar(f"{title}: {point['name']}", 1e3 / point["decode_ms"], unit="tokens/s", note=note))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Measure bits and sparsity side by side: loss, speed, bytes.")
    parser.add_argument("--folder", type=Path, help="keep measurements here, and go on with those it has")
    parser.add_argument("--plot", type=Path, help="folder for a picture of each model")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="these models alone")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="kinds of weights")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), help="what finds masks")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), help="their targets")
    parser.add_argument("--gguf", nargs="*", default=list(GGUF), help="types of llama.cpp's; none leaves it out")
    parser.add_argument("--batches", type=positive, default=32, help="calibration batches of 256 tokens")
    parser.add_argument("--together", type=positive, default=4, help="models timed at once, beside INT8")
    return run_benchmark("pareto", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
