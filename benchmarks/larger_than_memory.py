"""
Calibrate a model in less memory than its weights take, and hold the result against that of the model in memory.

    python benchmarks/larger_than_memory.py --json larger_than_memory.json

The model has random weights, in float32, written shard by shard into a temporary folder. `actsparse sparsify` reads it
under a limit on its memory: a control group's where this user may make one (Linux), which counts cached files too, else
the limit on a process's data (RLIMIT_DATA).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bars import Bar, Measurement
from command import announce, make_plain_parser, positive, run_benchmark
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from actsparse.errors import ActsparseError
from actsparse.models import load_model
from actsparse.thresholds import read_thresholds

GROUPS = Path("/sys/fs/cgroup/memory")
INNER = 11 / 4  # of the feed-forward network, over the model's width, as in most Llamas


def measure(options: argparse.Namespace) -> Measurement:
    """
    Make the model and calibrate it under the limit and without one.

    :param options: The options.
    :return: Memory against the model's size, and the difference between both results.
    """
    with tempfile.TemporaryDirectory(prefix="actsparse larger than memory ") as name:
        folder = Path(name)
        announce(f"writing a model of {options.layers} layers, {options.width} wide")
        size = write_model(folder / "model", options.layers, options.width)
        limit = options.limit * 10**6
        bars, samples = [], {}
        for algorithm in options.algorithms:
            announce(f"{algorithm}: in {options.limit} MB, of which {options.weights} MB for weights")
            found = run(folder, algorithm, options, limit)
            announce(f"{algorithm}: without a limit")
            free = run(folder, algorithm, options, None)
            difference = largest_difference(folder / f"{algorithm}-limited", folder / f"{algorithm}-free")
            note = f"{found['seconds']:.0f} s; in memory {free['seconds']:.0f} s, {free['peak'] / 1e6:.0f} MB"
            # Pages of the files that it reads count as resident, too.
            bars += [
                Bar(f"{algorithm}: thresholds off those of the model in memory", difference, 0.0, note="relative"),
                Bar(f"{algorithm}: resident memory over the model's size", found["peak"] / size, 0.999, note=note),
            ]
            samples[algorithm] = {"limited": found, "free": free}
    bars.append(Bar(f"limit ({limiter()}) over the model's size", limit / size, 0.999, note=f"{size / 1e6:.0f} MB"))
    names = ("layers", "width", "limit", "weights", "batches")
    settings = {name: getattr(options, name) for name in names} | {"limited_by": limiter(), "model_bytes": size}
    return Measurement(tuple(bars), settings, samples)


def write_model(folder: Path, layers: int, width: int) -> int:
    """
    Write a Llama with random weights, a block at a time.

    :param folder: Where.
    :param layers: Its blocks.
    :param width: Its hidden size.
    :return: Bytes of its weights.
    """
    folder.mkdir()
    tokenizer = load_model("default").tokenizer
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=int(INNER * width) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            scale = shapes[name][-1] ** -0.5
            is_norm = len(shapes[name]) == 1
            tensors[name] = torch.ones(shapes[name]) if is_norm else torch.empty(shapes[name])
            if not is_norm:
                tensors[name].normal_(0, scale, generator=generator)
        save_file(tensors, folder / file, {"format": "pt"})
    size = sum(4 * shape.numel() for shape in shapes.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def forget_file(path: Path) -> None:
    """
    Let the system forget a file's pages, so that they count for who reads them, and not for who wrote them.

    :param path: The file.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(folder: Path, algorithm: str, options: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """
    Calibrate in a process of its own.

    :param folder: Has the model, and gets the results.
    :param algorithm: The algorithm.
    :param options: The options.
    :param limit: How much memory it may take, in bytes; None for all there is.
    :return: Its peak memory and seconds.
    :raises ActsparseError: If it failed; carries its last line.
    """
    out = folder / f"{algorithm}-{'free' if limit is None else 'limited'}"
    command = [sys.executable, "-m", "actsparse", "sparsify", str(folder / "model"), "--out", str(out), "--quiet"]
    command += ["--sparsity", "0.5", "--algorithm", algorithm, "--batches", str(options.batches)]
    if limit is not None:
        command += ["--device", "auto", "--max-memory", f"{options.weights}MB"]
    for path in (folder / "model").glob("*.safetensors"):
        forget_file(path)
    with limited_group(limit) as enter:
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter)
        in_group = read_peak() if limit is not None else None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        msg = f"calibrating failed: {last.removeprefix('error: ')}"
        raise ActsparseError(msg)
    report = json.loads((out / "report.json").read_text())
    # A control group counts the files that the system keeps in memory for it too.
    return {"peak": report["peak_memory"], "peak_of_group": in_group, "seconds": report["calibration_seconds"]}


def limiter() -> str:
    """
    Tell what limits the memory here.

    :return: Its name.
    """
    return "control group" if GROUPS.is_dir() and os.access(GROUPS, os.W_OK) else "RLIMIT_DATA"


def _group() -> Path:
    return GROUPS / f"actsparse-{os.getpid()}"


def read_peak() -> int | None:
    """
    Read how much the control group has taken at most.

    :return: Bytes; None without one.
    """
    path = _group() / "memory.max_usage_in_bytes"
    return int(path.read_text()) if path.is_file() else None


@contextmanager
def limited_group(limit: int | None) -> Iterator[Any]:
    """
    Make what limits a child process.

    :param limit: Bytes; None for no limit.
    :return: A context with the function that the child calls before it starts.
    """
    if limit is None:
        yield None
        return
    if limiter() == "RLIMIT_DATA":
        yield lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return
    group = _group()
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        group.rmdir()


def largest_difference(first: Path, second: Path) -> float:
    """
    Compare two thresholds files.

    :param first: A folder with one.
    :param second: Another.
    :return: The largest relative difference.
    """
    ours, theirs = (read_thresholds(folder / "thresholds.safetensors").thresholds for folder in (first, second))
    return max(float(((ours[name] - theirs[name]).abs() / theirs[name].abs()).max()) for name in theirs)


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the benchmark.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if every bar is reached, 1 if not, 2 for a mistake of the user.
    """
    parser = make_plain_parser("Calibrate a model in less memory than its weights take.")
    parser.add_argument("--layers", type=positive, default=24, help="blocks of the model")
    parser.add_argument("--width", type=positive, default=1536, help="its hidden size")
    parser.add_argument("--limit", type=positive, default=2000, help="MB that the process may take")
    parser.add_argument("--weights", type=positive, default=500, help="MB of them that it may keep weights in")
    parser.add_argument("--batches", type=positive, default=2, help="calibration batches of 256 tokens")
    parser.add_argument("--algorithms", nargs="+", default=["magnitude", "auto"], help="what to calibrate with")
    return run_benchmark("larger_than_memory", parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
