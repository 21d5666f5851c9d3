"""
Time the same models in llama.cpp and in OpenVINO, dense and accelerated, round by round.

    python benchmarks/peers.py [--json FILE] [--models default qwen] [--rounds 7] [--folder FOLDER]

A round is a short run of each build of llama-bench, in a process of its own, and a short run of every OpenVINO model in
this process, turn by turn. Figures are medians over rounds; each contender counts with the build or the precision hint
that is best for it. With --folder, rounds that are done are not done again.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from real_models import REAL_MODELS, fetch_qwen

from actsparse.commands.bench.apart import compile_decoders
from actsparse.commands.bench.decoder import Decoder, make_core, name_processor
from actsparse.commands.bench.prepare import find_source, prepare_dense
from actsparse.commands.bench.sparse import make_sparse, measure_reads
from actsparse.commands.bench.timing import time_decoding, time_first_token
from actsparse.commands.bench.tokens import CALIBRATION_LENGTH, read_tokens
from actsparse.console.report import read_json, to_json
from actsparse.errors import ActsparseError
from actsparse.openvino.build import extension_path
from actsparse.runtime.environment import count_cores
from actsparse.storage.assets import fetch_model, partial_folder
from actsparse.storage.files import write_bytes
from actsparse.texts import load_pages

# GGUF files, which both programs start from. (llama-quantize takes the default model, Q4_1, as it is.)
SOURCES: dict[str, Callable[[], Path]] = {"default": fetch_model, "qwen": lambda: Path(fetch_qwen())}
# Weights in OpenVINO and in llama.cpp.
PAIRS = {"int8": "Q8_0", "int4": "Q4_0"}
SPARSITIES = (0.3, 0.4, 0.5)
CONTEXT, DISCARDED, TOKENS, PROMPT = 64, 5, 24, 128
REPETITIONS = 3
DENSE = "OpenVINO dense"


class Limits(NamedTuple):
    """
    Least speed-ups of decoding.

    :param dense: Over dense OpenVINO.
    :param llama: Over llama.cpp.
    """

    dense: float | None = None
    llama: float | None = None


LIMITS = {
    ("qwen", "int8", 0.5): Limits(1.7, 1.8),
    ("qwen", "int4", 0.5): Limits(1.45, 1.7),
    ("default", "int8", 0.5): Limits(1.7),
}

Times = Mapping[str, Mapping[str, float]]


def run_case(model: str, weights: str, tools: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """
    Time one model with one kind of weights, or go on where an earlier run ended.

    :param model: A name of `SOURCES`.
    :param weights: A name of `PAIRS`.
    :param tools: Builds of llama.cpp.
    :param options: The command line.
    :return: The rounds, with measured sparsities.
    :raises ActsparseError: If the model cannot be had, or something fails.
    """
    path = options.folder / f"{model}-{weights}.json"
    source = SOURCES[model]()
    core, threads = make_core(extension_path()), count_cores()
    origin = {"extension": extension_path().parent.name, "llama.cpp": llama_cpp.describe_builds(tools)}
    origin |= {"processor": name_processor(core), "threads": threads}
    case = read_json(path)
    if not isinstance(case, dict) or case.get("origin") != origin:
        case = {"origin": origin, "sparsities": {}, "rounds": []}
    if len(case["rounds"]) >= options.rounds:
        return case
    gguf = llama_cpp.quantize(source, PAIRS[weights], next(iter(tools.values())))
    dense = prepare_dense(find_source("default" if model == "default" else str(source)), weights, announce)
    texts = load_pages("default"), load_pages("default", purpose="calibration")
    length = max(PROMPT, CONTEXT + DISCARDED + TOKENS)
    tokens = read_tokens(dense, *texts, num_batches=4, calibration_length=CALIBRATION_LENGTH, length=length)
    with partial_folder() as folder:
        models = {DENSE: dense.xml}
        for sparsity in SPARSITIES:
            name = name_sparse(sparsity)
            announce(f"{model}, {weights}: making {name}")
            models[name] = folder / f"{sparsity}.xml"
            sparse = make_sparse(core, dense.xml, tokens.calibration, sparsity, is_exact=False, target=models[name])
            reads = measure_reads(core, sparse, tokens.measured, num_prompt_tokens=CONTEXT, threads=threads)
            case["sparsities"][name] = reads.measured_sparsity
        decoders = compile_decoders(core, models, extension_path(), threads, announce)
        for number in range(len(case["rounds"]), options.rounds):
            announce(f"{model}, {weights}: round {number + 1} of {options.rounds}")
            case["rounds"].append(time_round(decoders, tokens.measured, tools, gguf, threads))
            write_bytes(path, to_json(case).encode())
    return case


def time_round(
    decoders: Mapping[tuple[str, str], Decoder], tokens: np.ndarray, tools: Mapping[str, Path], gguf: Path, threads: int
) -> dict[str, dict[str, float]]:
    """
    Time everything once.

    :param decoders: OpenVINO models by name and precision hint.
    :param tokens: [1, tokens] to read.
    :param tools: Builds of llama.cpp.
    :param gguf: The model for llama.cpp.
    :param threads: How many threads compute.
    :return: Median milliseconds for a token and for the prompt, by contender.
    """
    found: dict[str, dict[str, float]] = {}
    for build, folder in tools.items():
        task = {"threads": threads, "repetitions": REPETITIONS}
        decoded = llama_cpp.time_llama(folder, gguf, prompt=CONTEXT, tokens=TOKENS, **task)
        prompt = llama_cpp.time_llama(folder, gguf, prompt=PROMPT, **task)
        found[f"llama.cpp/{build}"] = {"decode": median(decoded), "prompt": median(prompt)}
    length = CONTEXT + DISCARDED + TOKENS
    decode = time_decoding(decoders, tokens[:, :length], num_prompt_tokens=CONTEXT, num_discarded=DISCARDED)
    first = time_first_token(decoders, tokens, (PROMPT,), REPETITIONS)[PROMPT]
    for name, hint in decoders:
        times = {"decode": median(decode[name, hint]), "prompt": median(first[name, hint])}
        found[f"{name}/{hint}"] = times
    return found


def name_sparse(sparsity: float) -> str:
    """
    Name an accelerated model.

    :param sparsity: Its target.
    :return: The name.
    """
    return f"accelerated {sparsity:.0%}"


def sum_up(rounds: Sequence[Times]) -> dict[str, dict[str, tuple[float, str]]]:
    """
    Take medians over rounds, and the build or precision hint that is best.

    :param rounds: Of `time_round`.
    :return: Milliseconds and what they were reached with, by contender and by what was timed.
    """
    best: dict[str, dict[str, tuple[float, str]]] = {}
    for key in rounds[0]:
        name, _, kind = key.rpartition("/")
        for what in rounds[0][key]:
            figure = (median(times[key][what] for times in rounds), kind)
            earlier = best.setdefault(name, {}).get(what, figure)
            best[name][what] = min(earlier, figure)
    return best


def make_bars(model: str, weights: str, case: Mapping[str, Any]) -> list[Bar]:
    """
    Judge one case.

    :param model: A name of `SOURCES`.
    :param weights: A name of `PAIRS`.
    :param case: Of `run_case`.
    :return: The time of every contender, and the speed-ups with their bars.
    """
    title, best, bars = f"{REAL_MODELS[model].title} {weights.upper()}", sum_up(case["rounds"]), []
    for name, figures in best.items():
        (decode, how), (prompt, prompt_how) = figures["decode"], figures["prompt"]
        shown = f"llama.cpp {PAIRS[weights]}" if name == "llama.cpp" else name
        note = f"{how}, {1e3 / decode:.0f} tokens/s; prompt of {PROMPT} in {prompt:.0f} ms ({prompt_how})"
        bars.append(Bar(f"{title}: {shown}, a token", decode, unit="ms", note=note))
    for sparsity in SPARSITIES:
        sparse = best[name_sparse(sparsity)]
        limits = LIMITS.get((model, weights, sparsity), Limits())
        sides = ((DENSE, DENSE, limits.dense), ("llama.cpp", f"llama.cpp {PAIRS[weights]}", limits.llama))
        for key, shown, limit in sides:
            speedup = best[key]["decode"][0] / sparse["decode"][0]
            prompt = sparse["prompt"][0] / best[key]["prompt"][0]
            note = f"{case['sparsities'][name_sparse(sparsity)]:.1%} measured; prompt in {prompt:.2f} times its time"
            bars.append(Bar(f"{title}, {sparsity:.0%}: decoding over {shown}", speedup, limit, True, note=note))
    return bars


def measure(options: argparse.Namespace) -> Measurement:
    """
    Time all models with all weights.

    :param options: The command line.
    :return: All figures and bars.
    :raises ActsparseError: If no model can be had.
    """
    built = llama_cpp.build_tools()
    smallest = llama_cpp.quantize(fetch_model(), "Q8_0", next(iter(built.values())))
    tools = llama_cpp.keep_running(built, smallest, count_cores())
    bars: list[Bar] = []
    cases: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        options.folder.mkdir(parents=True, exist_ok=True)
        for model in options.models:
            try:
                SOURCES[model]()
            except ActsparseError as error:
                left_out[model] = str(error)
                announce(f"{model} is left out: {error}")
                continue
            for weights in PAIRS:
                case = run_case(model, weights, tools, options)
                cases[f"{model}-{weights}"] = case
                bars += make_bars(model, weights, case)
    if not cases:
        msg = f"no model can be had: {'; '.join(left_out.values())}"
        raise ActsparseError(msg)
    settings = {"llama.cpp": llama_cpp.describe_builds(tools), "threads": count_cores(), "left out": left_out}
    settings |= {
        "weights": PAIRS,
        "rounds": options.rounds,
        "decoded": f"{TOKENS} tokens after {CONTEXT}",
        "prompt": PROMPT,
    }
    return Measurement(tuple(bars), settings, cases)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Time the same models in llama.cpp and in OpenVINO, dense and accelerated.")
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=list(SOURCES), help="these models alone")
    parser.add_argument("--rounds", type=positive, default=7, help="how often everything is timed")
    parser.add_argument("--folder", type=Path, help="keep rounds here, and go on with those it has")
    return run_benchmark("peers", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
