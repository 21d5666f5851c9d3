"""The job behind `actsparse bench`: validate, prepare, then measure point by point."""

import gc
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openvino as ov

from actsparse.algorithms import ZEROS
from actsparse.commands.bench import tokens as bench_tokens
from actsparse.commands.bench.apart import PREFILL_TOKENS, compile_decoders, run_apart
from actsparse.commands.bench.decoder import list_precisions, make_core, name_processor
from actsparse.commands.bench.memory import measure_memory, require_memory
from actsparse.commands.bench.prepare import (
    SEED,
    SHAPES,
    WEIGHT_BYTES,
    WEIGHTS,
    DenseModel,
    count_parameters,
    find_source,
    prepare_dense,
    require_plain,
)
from actsparse.commands.bench.results import BenchReport, Point, Side, best_precision
from actsparse.commands.bench.sparse import count_linear_bytes, make_sparse, measure_reads
from actsparse.commands.bench.timing import BATCH_TOKENS, CONTEXT_TOKENS, DISCARDED_TOKENS, time_models
from actsparse.commands.common import parse_targets
from actsparse.console.plot import plot_speedup
from actsparse.errors import ActsparseError, OutputError, ScopeError, nearest
from actsparse.openvino.build import extension_path
from actsparse.runtime.environment import count_cores, describe_environment
from actsparse.runtime.progress import Say
from actsparse.scopes.matching import validate_targets
from actsparse.storage import assets
from actsparse.storage.files import kind_of, prepare_folder
from actsparse.texts import load_pages
from actsparse.thresholds import read_thresholds

DEFAULT_SPARSITY = "0.5"
PROMPT_LENGTHS = (32, 128, 512, 1024)
BATCH_SIZES = (4, 16)
_MAX_BATCH = 256
# Each of the four compiled models holds its weights, beside the mapped files: 9.2 GB measured with `1b` as int8, a
# quarter of it mapped.
_NUM_COMPILED, _MEMORY_FACTOR, _MEMORY_BYTES = 4, 6.0, 2.0**30


@dataclass(frozen=True)
class BenchJob:
    """What `actsparse bench` is asked to do; see its help."""

    model: str
    sparsities: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    thresholds: Path | None = None
    zeros: bool = False
    weights: str | None = None
    is_exact: bool = False
    num_tokens: int = 60
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    repetitions: int = 3
    threads: int | None = None
    target_speedup: float | None = None
    text: str = "default"
    calibration: str = "default"
    num_batches: int = 4
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights not in WEIGHTS:
            choices, closest = ", ".join(WEIGHTS), nearest(self.weights, WEIGHTS, 1)
            msg = f"--weights is {self.weights!r}; it is one of {choices} (nearest: {closest})"
            raise ActsparseError(msg)
        cores = count_cores()
        _require_range("--threads", self.threads or cores, 1, cores)
        _require_range("--tokens", self.num_tokens, 10, 100_000)
        _require_range("--repetitions", self.repetitions, 3, 1000)
        _require_range("--batches", self.num_batches, 1, 10_000)
        for length in self.prompt_lengths:
            _require_range("--prompt-lengths", length, 1, 1_000_000)
        for size in self.batch_sizes:
            _require_range("--batch-sizes", size, 1, _MAX_BATCH)
        if self.model in SHAPES and (self.text, self.calibration) != ("default", "default"):
            msg = f"{self.model} has random weights and reads random tokens: leave --text and --calibration out"
            raise ActsparseError(msg)
        if self.target_speedup is not None:
            if not 1 < self.target_speedup < math.inf:
                msg = f"--target-speedup is {self.target_speedup}; it must be above 1, such as 1.5"
                raise ActsparseError(msg)
            is_one_point = self.targets or self.roles or self.thresholds or self.zeros
            if is_one_point or len(_parse_sparsities(self.sparsities)) < 2:
                msg = "--target-speedup needs at least two points between which to tell: --sparsity 0.3,0.6"
                raise ScopeError(msg)
        for option, is_given in (("--thresholds", self.thresholds is not None), ("--zeros", self.zeros)):
            if is_given and (self.sparsities or self.targets or self.roles):
                msg = f"{option} says how sparse each layer is: leave --sparsity, --target and --role out"
                raise ScopeError(msg)
        if self.thresholds is not None and self.zeros:
            msg = "--thresholds and --zeros are two ways to say what is masked: give one of them"
            raise ScopeError(msg)
        if self.thresholds is not None:
            read_thresholds(self.thresholds)
        if self.thresholds is not None or self.zeros:
            return
        for target in self.parsed_targets():
            validate_targets(target, None)

    def parsed_targets(self) -> list[Any]:
        """
        Turn the command line's targets into what `make_sparse` takes.

        :raises ScopeError: If they cannot be understood.
        """
        if self.thresholds is not None:
            return [self.thresholds]
        if self.zeros:
            return [ZEROS]
        if self.targets or self.roles:
            first = _parse_sparsities(self.sparsities)[0] if self.sparsities else None
            return [parse_targets(self.targets, self.roles, first)]
        return list(_parse_sparsities(self.sparsities or (DEFAULT_SPARSITY,)))


@dataclass(frozen=True)
class _Bench:
    """What all points share."""

    job: BenchJob
    dense: DenseModel
    tokens: bench_tokens.Tokens
    core: ov.Core
    extension: Path
    precisions: tuple[str, ...]
    linear_bytes: int
    threads: int
    say: Say
    # By precision hint, measured once for all points.
    dense_peaks: dict[str, int] = field(default_factory=dict)


def run_bench(job: BenchJob, say: Say) -> BenchReport:
    """
    Measure a model dense and sparse, side by side.

    :raises ActsparseError: If an input cannot be used, a tool is missing, or there is too little memory.
    """
    _require_outputs(job)
    extension = extension_path()
    source = find_source(job.model)
    if source.config is not None:
        weight_bytes = count_parameters(source.config) * WEIGHT_BYTES[job.weights or "int8"]
        _require_memory(job, weight_bytes, source.config.vocab_size)
    texts = (load_pages(job.text), load_pages(job.calibration, purpose="calibration")) if source.has_text else ()
    dense = prepare_dense(source, job.weights, say)
    bench = _set_up(job, dense, texts, extension, say)
    say("measuring how fast memory is copied and read")
    memory = measure_memory(extension, bench.threads)
    with assets.partial_folder() as folder:
        targets = enumerate(job.parsed_targets())
        points = tuple(_measure_point(bench, target, folder / f"sparse{i}.xml") for i, target in targets)
    seeds = {"weights": SEED} if job.model in SHAPES else {}
    seeds |= {} if dense.has_text else {"tokens": bench_tokens.SEED}
    machine = {"openvino_build": ov.get_version(), "processor": name_processor(bench.core)}
    return BenchReport(_describe(bench), seeds, points, memory, describe_environment() | machine)


def describe_report(job: BenchJob, report: BenchReport) -> dict[str, Any]:
    """
    Turn what was measured into what JSON can hold.

    :return: Every figure, with the answer to `--target-speedup`.
    """
    contents = report.to_dict()
    if job.target_speedup is not None:
        sparsity = report.sparsity_for(job.target_speedup)
        contents["target_speedup"] = {"speedup": job.target_speedup, "sparsity": sparsity}
    return contents


def draw_plot(job: BenchJob, report: BenchReport) -> None:
    """
    Write the plot, where one was asked for.

    :raises OutputError: If it cannot be written.
    """
    if job.plot is None:
        return
    points = [(point.reads.measured_sparsity, point.decode_speedup) for point in report.points]
    share = max(point.reads.accelerated_share for point in report.points)
    title = f"{Path(job.model).name}, weights {report.settings['weights']}, {report.settings['threads']} threads"
    plot_speedup(points, share, title, job.plot)


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """
    Read whole numbers.

    :raises ActsparseError: If it is something else.
    """
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        msg = f"{option} takes whole numbers with commas between, such as 4,16, not {text!r}"
        raise ActsparseError(msg) from None


def _set_up(job: BenchJob, dense: DenseModel, texts: Any, extension: Path, say: Say) -> _Bench:
    core = make_core(extension)
    max_length = dense.max_length
    model = core.read_model(dense.xml)
    require_plain(model, job.model)
    length = max(*job.prompt_lengths, CONTEXT_TOKENS + DISCARDED_TOKENS + job.num_tokens)
    if length > max_length:
        msg = f"{job.model} reads at most {max_length} tokens, but prompts and decoding take {length}"
        raise ActsparseError(msg)
    vocabulary = int(dense.config["vocab_size"])
    _require_memory(job, dense.xml.with_suffix(".bin").stat().st_size, vocabulary)
    sizes = {
        "num_batches": job.num_batches,
        "calibration_length": min(bench_tokens.CALIBRATION_LENGTH, max_length),
        "length": length,
    }
    if dense.has_text:
        tokens = bench_tokens.read_tokens(dense, *texts, **sizes)
    else:
        tokens = bench_tokens.make_random_tokens(vocabulary, **sizes)
    linear_bytes = count_linear_bytes(core, dense.xml)
    threads = job.threads or count_cores()
    return _Bench(job, dense, tokens, core, extension, list_precisions(core), linear_bytes, threads, say)


def _measure_point(bench: _Bench, target: Any, xml: Path) -> Point:
    job = bench.job
    name = f"{target:.0%} sparsity" if isinstance(target, float) else "the masks asked for"
    bench.say(f"calibrating and packing {name}")
    sparse = make_sparse(
        bench.core, bench.dense.xml, bench.tokens.calibration, target, is_exact=job.is_exact, target=xml
    )
    bench.say("counting zeros while it decodes")
    decoded = bench.tokens.measured[:, : CONTEXT_TOKENS + DISCARDED_TOKENS + job.num_tokens]
    reads = measure_reads(bench.core, sparse, decoded, num_prompt_tokens=CONTEXT_TOKENS, threads=bench.threads)
    run, kept = (
        sum(len(site.layers) for site in sites) for sites in (sparse.acceleration.masked, sparse.acceleration.kept)
    )
    del sparse
    gc.collect()
    bench.say(f"compiling dense and sparse for {' and '.join(bench.precisions)}")
    timings = time_models(
        compile_decoders(
            bench.core, {"dense": bench.dense.xml, "sparse": xml}, bench.extension, bench.threads, bench.say
        ),
        bench.tokens.measured,
        num_tokens=job.num_tokens,
        batch_sizes=job.batch_sizes,
        prompt_lengths=job.prompt_lengths,
        repetitions=job.repetitions,
        say=bench.say,
    )
    bench.say("measuring peak memory, each model in its own process")
    precision = best_precision(timings["dense"])
    measure_peak = partial(
        run_apart,
        extension=bench.extension,
        threads=bench.threads,
        vocabulary=int(bench.dense.config["vocab_size"]),
        prefill=min(PREFILL_TOKENS, bench.dense.max_length // 2),
    )
    if precision not in bench.dense_peaks:
        bench.dense_peaks[precision] = measure_peak(bench.dense.xml, precision=precision)
    sparse_peak = measure_peak(xml, precision=best_precision(timings["sparse"]))
    for file in (xml, xml.with_suffix(".bin")):
        file.unlink()
    dense_side = Side(timings["dense"], bench.dense_peaks[precision], bench.linear_bytes)
    sparse_side = Side(timings["sparse"], sparse_peak, bench.linear_bytes * (1 - reads.weight_reads_skipped))
    return Point(_name_target(target), reads, dense_side, sparse_side, (run, kept))


def _require_memory(job: BenchJob, weight_bytes: float, vocabulary: int) -> None:
    # Logits of every prompt token, in fp32, twice in each compiled model.
    longest = max(*job.prompt_lengths, CONTEXT_TOKENS * max(job.batch_sizes))
    logits = 2 * 4 * _NUM_COMPILED * longest * vocabulary
    needed = weight_bytes * _MEMORY_FACTOR + logits + _MEMORY_BYTES
    require_memory(needed, f"comparing dense and sparse {job.model} in one process")


def _require_outputs(job: BenchJob) -> None:
    if job.plot is None:
        return
    if kind_of(job.plot, OutputError) == "folder":
        msg = f"{job.plot} is a folder; give a file"
        raise OutputError(msg)
    prepare_folder(job.plot.parent)
    if importlib.util.find_spec("matplotlib") is None:
        msg = f"cannot draw {job.plot}: matplotlib is not installed; pip install 'actsparse[plot]'"
        raise OutputError(msg)


def _parse_sparsities(texts: tuple[str, ...]) -> tuple[float, ...]:
    parts = [part.strip() for text in texts for part in text.split(",")]
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        msg = f"--sparsity takes numbers in [0, 1] such as 0.5 or 0.3,0.5,0.7, not {', '.join(texts)!r}"
        raise ScopeError(msg) from None
    if len(set(values)) < len(values):
        msg = f"--sparsity has a number twice: {', '.join(parts)}"
        raise ScopeError(msg)
    return values


def _require_range(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        msg = f"{option} is {value}; it must be in [{low}, {high}]"
        raise ActsparseError(msg)


def _name_target(target: Any) -> float | str | dict[str, float]:
    if isinstance(target, Path):
        return target.name
    if isinstance(target, str):
        return target
    if not isinstance(target, Mapping):
        return float(target)
    return {", ".join((*scope.names, *scope.patterns, *scope.roles)): value for scope, value in target.items()}


def _describe(bench: _Bench) -> dict[str, Any]:
    job = bench.job
    return {
        "model": job.model,
        "weights": bench.dense.weights,
        "linear weights": f"{bench.linear_bytes / 1e6:.0f} MB",
        "tokens": bench.tokens.source,
        "calibration": f"{job.num_batches} x {bench.tokens.calibration[0]['input_ids'].shape[1]} tokens",
        "decoded": f"{job.num_tokens} tokens after {CONTEXT_TOKENS} of context and {DISCARDED_TOKENS} discarded",
        "batches": f"{min(BATCH_TOKENS, job.num_tokens)} tokens of each sequence",
        "prompts": f"{job.repetitions} of each length",
        "threads": bench.threads,
        "precision hints tried": ", ".join(bench.precisions),
        "kernel": "exact (24-bit activations)" if job.is_exact else "INT8 activations",
    }
