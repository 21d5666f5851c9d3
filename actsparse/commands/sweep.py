"""`actsparse sweep`: algorithms against sparsities, each point in a file of its own so that no work is done twice."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from actsparse.algorithms import Algorithm, MeasurementCache, get_algorithm, get_allocating_algorithm
from actsparse.calibration import Calibration, Settings
from actsparse.commands.common import (
    CALIBRATION_LENGTH,
    compress,
    load_for_job,
    name_weights,
    point_key,
    read_batches,
    validate_precision,
)
from actsparse.console.plot import plot_frontier
from actsparse.console.report import make_caption, percent, read_json, write_json
from actsparse.errors import ActsparseError
from actsparse.evaluation.bootstrap import bootstrap_interval
from actsparse.evaluation.comparison import Comparison, compare_with_dense
from actsparse.models.identity import model_identity
from actsparse.runtime.environment import describe_environment
from actsparse.runtime.progress import Say
from actsparse.scopes.target_scope import TargetScope
from actsparse.sparsify import calibrate
from actsparse.storage.files import prepare_folder
from actsparse.texts import Text, load_pages

# Points are compared at equal measured sparsity: so far may it be from what was asked for, after so many corrections.
TOLERANCE = 0.003
CORRECTIONS = 2

# What is read of a point that an earlier run has written: numbers, lists of numbers, and what is null where it was too
# large for a float.
_NUMBERS = ("sparsity", "target", "measured_sparsity", "loss_increase", "top1_agreement", "calibration_seconds")
_LISTS = ("loss_increase_interval", "window_losses", "window_tokens")
_NUMBERS_OR_NULL = ("word_perplexity", "token_perplexity", "kl_divergence")

Point = dict[str, Any]


@dataclass(frozen=True)
class SweepJob:
    """What `actsparse sweep` is asked to do; see its help."""

    model: str
    out: Path
    algorithms: tuple[str, ...]
    sparsities: tuple[float, ...]
    roles: tuple[str, ...] = ()
    int8: str | None = None
    dtype: str = "fp32"
    calibration: str = "default"
    num_batches: int = 32
    text: str = "default"
    num_pages: int | None = None
    max_length: int = 512
    tokenizer: str | None = None
    device: str = "cpu"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        validate_precision(self.int8, self.dtype)
        if not self.algorithms or not self.sparsities:
            msg = "a sweep needs at least one algorithm and one sparsity"
            raise ActsparseError(msg)
        for name in self.algorithms:
            get_allocating_algorithm(name)
        if self.roles:
            TargetScope(roles=self.roles)
        for sparsity in self.sparsities:
            if not 0 < sparsity < 1:
                msg = f"--sparsity takes numbers between 0 and 1, not {sparsity}"
                raise ActsparseError(msg)


@dataclass(frozen=True)
class Attempt:
    """
    An algorithm at one target.

    :param seconds: How long it takes alone: what earlier attempts measured for it counts too.
    :param calibration: How often the model ran for what no attempt before had measured, and what was chosen.
    """

    target: float
    seconds: float
    calibration: Calibration
    comparison: Comparison


@dataclass(frozen=True)
class Sweep:
    """
    The points of a sweep.

    :param points: One for each algorithm and sparsity, in the order asked for.
    """

    settings: dict[str, Any]
    points: tuple[Point, ...]

    def winner(self, sparsity: float) -> Point:
        """Find the best algorithm at one sparsity."""
        return min(self.at(sparsity), key=lambda point: point["loss_increase"])

    def at(self, sparsity: float) -> list[Point]:
        """Select points."""
        return [point for point in self.points if point["sparsity"] == sparsity]

    @property
    def sparsities(self) -> list[float]:
        """Those asked for, ascending."""
        return sorted({point["sparsity"] for point in self.points})

    def verdict(self, point: Point) -> str:
        """
        Compare a point with the winner at its sparsity.

        :return: `best`, `tie` where the 95% interval of the difference over windows holds 0, or how much more it loses.
        """
        best = self.winner(point["sparsity"])
        if point is best:
            return "best"
        tokens = np.array(point["window_tokens"])
        difference = (np.array(point["window_losses"]) - np.array(best["window_losses"])) / tokens
        low, _ = bootstrap_interval(difference, tokens)
        if low <= 0:
            return "tie"
        return f"{point['loss_increase'] / best['loss_increase']:.2f} x" if best["loss_increase"] > 0 else "worse"

    def to_table(self) -> Table:
        """Draw the sweep for a terminal."""
        caption = make_caption(self.settings)
        table = Table(title="Algorithms at equal measured sparsity", caption=caption, caption_justify="left")
        for name in ("sparsity", "algorithm", "measured", "word ppl", "token ppl", "Δ loss", "KL", "top-1", "minutes"):
            table.add_column(name, justify="left" if name == "algorithm" else "right")
        table.add_column("beside the best")
        for sparsity in self.sparsities:
            for point in sorted(self.at(sparsity), key=lambda point: point["loss_increase"]):
                table.add_row(percent(sparsity), *_cells(point), self.verdict(point))
            table.add_section()
        return table

    def to_dict(self) -> dict[str, Any]:
        """Turn the sweep into what JSON can hold."""
        winners = {str(sparsity): self.winner(sparsity)["algorithm"] for sparsity in self.sparsities}
        points = [{**point, "verdict": self.verdict(point)} for point in self.points]
        return {"settings": self.settings, "winners": winners, "points": points, "environment": describe_environment()}


def parse_sparsities(text: str) -> tuple[float, ...]:
    """
    Read a list of sparsities.

    :raises ActsparseError: If one is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        msg = f"--sparsity takes numbers between commas, such as 0.4,0.5, not {text!r}"
        raise ActsparseError(msg) from None


def run_sweep(job: SweepJob, say: Say) -> Sweep:
    """
    Measure every point that has not been measured before.

    :return: The sweep; also written to the folder as sweep.json and frontier.png.
    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    calibration = load_pages(job.calibration, purpose="calibration")
    text = load_pages(job.text, num_pages=job.num_pages)
    prepare_folder(job.out)
    prepare_folder(job.out / "points")
    settings = _settings(job, calibration, text)
    identity = model_identity(job.model)

    def path_of(algorithm: str, sparsity: float) -> Path:
        key = point_key(settings, identity, algorithm, sparsity)
        return job.out / "points" / f"{algorithm}-{sparsity:g}-{key}.json"

    points: dict[tuple[str, float], Point] = {}
    missing = []
    for algorithm in dict.fromkeys(job.algorithms):
        for sparsity in dict.fromkeys(job.sparsities):
            point = _read_point(path_of(algorithm, sparsity))
            if point is None:
                missing.append((get_algorithm(algorithm), sparsity))
            else:
                say(f"{algorithm} at {percent(sparsity)} has been measured before")
                points[algorithm, sparsity] = point
    if missing:
        # What an algorithm measured beyond its target at one sparsity, it will at another.
        offsets = {point["algorithm"]: point["target"] - point["measured_sparsity"] for point in points.values()}
        for point in _measure(job, calibration, text, missing, offsets, say):
            write_json(path_of(point["algorithm"], point["sparsity"]), point)
            points[point["algorithm"], point["sparsity"]] = point
    order = [(algorithm, sparsity) for algorithm in job.algorithms for sparsity in job.sparsities]
    sweep = Sweep(settings, tuple(points[key] for key in dict.fromkeys(order)))
    write_json(job.out / "sweep.json", sweep.to_dict())
    plot_frontier(sweep.points, job.out / "frontier.png")
    return sweep


def _measure(
    job: SweepJob,
    calibration: Text,
    text: Text,
    missing: list[tuple[Algorithm, float]],
    offsets: dict[str, float],
    say: Say,
) -> Iterator[Point]:
    say(f"loading {job.model}")
    loaded = load_for_job(job.model, job)
    batches = read_batches(loaded, calibration, job.num_batches)
    model = compress(loaded.model, job.int8, batches[0], say)
    caches: dict[str, MeasurementCache] = {}
    for number, (algorithm, sparsity) in enumerate(missing, start=1):
        say(f"{algorithm.name} at {percent(sparsity)} ({number} of {len(missing)})")
        settings = Settings(algorithm, cache=caches.setdefault(algorithm.name, MeasurementCache()))
        compare = partial(compare_with_dense, model, loaded.tokenizer, text.pages, max_length=job.max_length)
        # What an algorithm that has no point yet will measure beyond its target is near what others do.
        usual = fmean(offsets.values()) if offsets else 0.0
        first = sparsity + offsets.get(algorithm.name, usual)
        best = _meet(sparsity, first, partial(_attempt, model, batches, settings, compare, job.roles))
        offsets[algorithm.name] = best.target - best.comparison.sparsity.sparsity
        # Seconds are those of this point alone; runs of the model that earlier points took are not counted again.
        took = best.calibration.to_dict()
        took = {"new_forwards": took.pop("forwards"), "new_backwards": took.pop("backwards"), **took}
        yield {
            "algorithm": algorithm.name,
            "score": algorithm.score,
            "allocation": algorithm.allocation,
            "sparsity": sparsity,
            "target": best.target,
            "calibration_seconds": round(best.seconds, 2),
            "calibration": took,
            **best.comparison.to_dict(),
        }


def _attempt(
    model: Any,
    batches: list[Any],
    settings: Settings,
    compare: Callable[[], Comparison],
    roles: tuple[str, ...],
    target: float,
) -> Attempt:
    settings.cache.begin()
    start = time.perf_counter()
    targets = {TargetScope(roles=roles): target} if roles else target
    calibration = calibrate(model, batches, targets, None, settings)
    # As long as it takes alone: what it took from earlier points counts too.
    seconds = settings.cache.reused_seconds + time.perf_counter() - start
    return Attempt(target, seconds, calibration, compare())


def _meet(sparsity: float, first: float, attempt: Callable[[float], Attempt]) -> Attempt:
    """Move the target, from a first one on, until the sparsity measured on the evaluation text is the one asked for."""
    found = attempt(min(max(first, 0.0), 1.0))
    for _ in range(CORRECTIONS):
        error = found.comparison.sparsity.sparsity - sparsity
        if abs(error) <= TOLERANCE:
            break
        found = attempt(min(max(found.target - error, 0.0), 1.0))
    return found


def _settings(job: SweepJob, calibration: Text, text: Text) -> dict[str, Any]:
    optional = {"layers": ", ".join(job.roles), "tokenizer": job.tokenizer}
    return {
        "model": job.model,
        **{name: value for name, value in optional.items() if value},
        "weights": name_weights(job.int8, job.dtype),
        "calibration text": f"{calibration.name}: {job.num_batches} x {CALIBRATION_LENGTH} tokens",
        "evaluation text": f"{text.name}: {len(text.pages)} pages, windows of {job.max_length}",
        "texts": f"{calibration.sha256[:12]} {text.sha256[:12]}",
    }


def _read_point(path: Path) -> Point | None:
    point = read_json(path)
    return point if isinstance(point, dict) and _is_complete(point) else None


def _is_complete(point: Point) -> bool:
    if not isinstance(point.get("algorithm"), str) or not all(isinstance(point.get(name), list) for name in _LISTS):
        return False
    interval, losses, tokens = (point[name] for name in _LISTS)
    numbers = [*(point.get(name) for name in _NUMBERS), *interval, *losses, *tokens]
    numbers += [value for name in _NUMBERS_OR_NULL if (value := point.get(name, "missing")) is not None]
    return len(interval) == 2 and len(losses) == len(tokens) > 0 and all(map(_is_finite, numbers))


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _cells(point: Point) -> tuple[str, ...]:
    low, high = point["loss_increase_interval"]
    return (
        point["algorithm"],
        percent(point["measured_sparsity"]),
        _format(point["word_perplexity"], ".2f"),
        _format(point["token_perplexity"], ".3f"),
        f"{point['loss_increase']:.4f} ({low:.3f} – {high:.3f})",
        _format(point["kl_divergence"], ".4f"),
        percent(point["top1_agreement"]),
        f"{point['calibration_seconds'] / 60:.1f}",
    )


def _format(value: float | None, spec: str) -> str:
    # What is null in a file was infinite in the run that wrote it.
    return format(value, spec) if value is not None and math.isfinite(value) else "–"
