"""What a benchmark measured: as numbers, as JSON, and as tables for the terminal."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from actsparse.commands.bench.memory import MemorySpeed
from actsparse.commands.bench.sparse import Reads
from actsparse.console.report import percent

_COLUMNS = (
    *("", "measured", "reads skipped", "ms/token", "p10 – p90", "tokens/s"),
    *("GB/s", "of reading", "peak MB", "speed-up", "limit"),
)


@dataclass(frozen=True)
class Quantiles:
    """
    Times of many tokens.

    :param median: Milliseconds.
    """

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, times: list[float]) -> "Quantiles":
        """
        Sum up times.

        :param times: Milliseconds.
        """
        p10, median, p90 = np.percentile(times, [10, 50, 90])
        return cls(float(median), float(p10), float(p90))

    def to_dict(self) -> dict[str, float]:
        """Turn the times into what JSON can hold."""
        return {"median": round(self.median, 3), "p10": round(self.p10, 3), "p90": round(self.p90, 3)}


@dataclass(frozen=True)
class Timing:
    """
    One model compiled with one precision hint.

    :param decode: Milliseconds for a token.
    :param ttft: Median milliseconds to the first token, by prompt length.
    :param batches: Milliseconds for a token of every sequence, by how many are decoded at once.
    """

    decode: Quantiles
    ttft: Mapping[int, float]
    batches: Mapping[int, Quantiles] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Turn the times into what JSON can hold."""
        return {
            "decode_ms": self.decode.to_dict(),
            "ttft_ms": {str(n): round(ms, 2) for n, ms in self.ttft.items()},
            "batch_ms": {str(size): times.to_dict() for size, times in self.batches.items()},
        }


@dataclass(frozen=True)
class Side:
    """
    The dense or the sparse model, each figure with the precision hint that is best for it.

    :param peak_bytes: Peak resident memory with the hint that decodes fastest, in a process of its own.
    :param bytes_per_token: Weight bytes that decoding a token reads.
    """

    timings: Mapping[str, Timing]
    peak_bytes: int
    bytes_per_token: float

    @property
    def precision(self) -> str:
        """The hint that decodes fastest."""
        return best_precision(self.timings)

    @property
    def decode(self) -> Quantiles:
        """Milliseconds for a token."""
        return self.timings[self.precision].decode

    @property
    def ttft(self) -> dict[int, float]:
        """Milliseconds to the first token, by prompt length."""
        lengths = next(iter(self.timings.values())).ttft
        return {n: min(timing.ttft[n] for timing in self.timings.values()) for n in lengths}

    @property
    def batches(self) -> dict[int, Quantiles]:
        """Milliseconds for a token of every sequence, by how many are decoded at once."""
        sizes = next(iter(self.timings.values())).batches
        timings = self.timings.values()
        return {n: min((t.batches[n] for t in timings), key=lambda times: times.median) for n in sizes}

    @property
    def tokens_per_second(self) -> float:
        """How fast it decodes."""
        return 1e3 / self.decode.median

    @property
    def bandwidth(self) -> float:
        """Weight bytes read per second, over the whole time of a token: what else it does counts too."""
        return self.bytes_per_token * self.tokens_per_second

    def to_dict(self, copied: float, read: float) -> dict[str, Any]:
        """
        Turn the side into what JSON can hold.

        :param copied: How fast memory is copied, in bytes per second.
        :param read: How fast it is read in the way that this side reads weights.
        """
        return {
            "precision": self.precision,
            "decode_ms": self.decode.to_dict(),
            "tokens_per_second": {
                "median": round(self.tokens_per_second, 2),
                "p10": round(1e3 / self.decode.p90, 2),
                "p90": round(1e3 / self.decode.p10, 2),
            },
            "ttft_ms": {str(n): round(ms, 2) for n, ms in self.ttft.items()},
            "batch_ms": {str(size): times.to_dict() for size, times in self.batches.items()},
            "peak_rss_mb": round(self.peak_bytes / 1e6, 1),
            "weight_bytes_per_token": round(self.bytes_per_token),
            "effective_gb_per_s": round(self.bandwidth / 1e9, 2),
            "share_of_copy_bandwidth": round(self.bandwidth / copied, 3),
            "share_of_read_bandwidth": round(self.bandwidth / read, 3),
            "by_precision": {hint: timing.to_dict() for hint, timing in self.timings.items()},
        }


@dataclass(frozen=True)
class Point:
    """
    One target, dense and sparse measured side by side.

    :param layers: How many layers the kernel runs, and how many masked ones it does not.
    """

    target: float | str | dict[str, float]
    reads: Reads
    dense: Side
    sparse: Side
    layers: tuple[int, int]

    @property
    def name(self) -> str:
        """What was asked for, such as ``50%`` or ``ffn.down=0.5``."""
        if isinstance(self.target, str):
            return self.target
        if isinstance(self.target, Mapping):
            return ", ".join(f"{name}={value:g}" for name, value in self.target.items())
        return percent(self.target).replace(".0%", "%")

    @property
    def decode_speedup(self) -> float:
        """Median dense time over median sparse time of a token."""
        return self.dense.decode.median / self.sparse.decode.median

    @property
    def speedup_limit(self) -> float:
        """The speed-up if time went with the weight bytes that are left to read."""
        return 1 / (1 - self.reads.weight_reads_skipped)

    @property
    def ttft_ratio(self) -> dict[int, float]:
        """Sparse over dense time to first token, by prompt length."""
        sparse = self.sparse.ttft
        return {n: sparse[n] / ms for n, ms in self.dense.ttft.items()}

    @property
    def batch_speedup(self) -> dict[int, float]:
        """Dense over sparse time of a token of every sequence, by how many are decoded at once."""
        sparse = self.sparse.batches
        return {size: times.median / sparse[size].median for size, times in self.dense.batches.items()}

    def to_dict(self, memory: MemorySpeed) -> dict[str, Any]:
        """Turn the point into what JSON can hold; `memory` says how fast memory is."""
        return {
            "target": self.target,
            "measured_sparsity": round(self.reads.measured_sparsity, 4),
            "weight_reads_skipped": round(self.reads.weight_reads_skipped, 4),
            "decode_speedup": round(self.decode_speedup, 3),
            "decode_speedup_limit": round(self.speedup_limit, 3),
            "ttft_ratio": {str(n): round(ratio, 3) for n, ratio in self.ttft_ratio.items()},
            "batch_speedup": {str(size): round(speedup, 3) for size, speedup in self.batch_speedup.items()},
            "layers": {"accelerated": self.layers[0], "masked_only": self.layers[1]},
            "dense": self.dense.to_dict(memory.copied, memory.read),
            "sparse": self.sparse.to_dict(memory.copied, memory.half_read),
        }


@dataclass(frozen=True)
class BenchReport:
    """What `run_bench` measured."""

    settings: dict[str, Any]
    seeds: dict[str, int]
    points: tuple[Point, ...]
    memory: MemorySpeed
    environment: dict[str, Any]

    def sparsity_for(self, speedup: float) -> float | None:
        """
        Estimate how sparse the model has to be to decode so many times as fast.

        A token's time is taken for linear in measured sparsity, as far as the points tell; relative to the dense
        model's in the same run, because absolute times drift.

        :return: The sparsity; None where the points do not tell (fewer than two, or no gain between them) or no
            sparsity below 1 reaches it.
        """
        measured = sorted((point.reads.measured_sparsity, 1 / point.decode_speedup) for point in self.points)
        if len(measured) < 2 or measured[-1][0] - measured[0][0] < 0.01:
            return None
        slope, intercept = np.polyfit([s for s, _ in measured], [time for _, time in measured], 1)
        if slope >= 0:
            return None
        sparsity = float((1 / speedup - intercept) / slope)
        return max(sparsity, 0.0) if sparsity < 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Turn the report into what JSON can hold; the figures of an only point stand at the top too."""
        points = [point.to_dict(self.memory) for point in self.points]
        return {
            "settings": self.settings,
            "seeds": self.seeds,
            **(points[0] if len(points) == 1 else {}),
            "points": points,
            **self.memory.to_dict(),
            "environment": self.environment,
        }


def best_precision(timings: Mapping[str, Timing]) -> str:
    """Choose the precision hint that decodes fastest."""
    return min(timings, key=lambda hint: timings[hint].decode.median)


def make_tables(report: BenchReport) -> list[Table]:
    """
    Draw a report.

    :return: A table of decoding, one of batches where there were any, and one of times to first token.
    """
    tables = [_decode_table(report)]
    if report.points[0].batch_speedup:
        title = "Decoding several sequences at once, ms for a token of each (in brackets: speed-up)"
        tables.append(_compare(report, title, "sequences", _batch_medians, lambda point: point.batch_speedup, 1))
    title = "Time to first token, ms (in brackets: sparse over dense)"
    first = _compare(report, title, "prompt, tokens", lambda side: side.ttft, lambda point: point.ttft_ratio, 0)
    return [*tables, first]


def _decode_table(report: BenchReport) -> Table:
    lines = [f"{name}: {value}" for name, value in report.settings.items()]
    memory = report.memory
    lines += [
        f"memory: {memory.copied / 1e9:.1f} GB/s copied, {memory.read / 1e9:.1f} GB/s read in rows of a page, "
        f"{memory.half_read / 1e9:.1f} GB/s where a random half of the rows is read",
        "GB/s: weight bytes read, over the whole time of a token",
        "of reading: their share of all rows' speed for dense, of half the rows' for sparse",
        "limit: speed-up if only weight bytes counted",
    ]
    table = Table(title="Decoding", caption=escape("\n".join(lines)), caption_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column else "left")
    for point in report.points:
        name, reads = escape(point.name), point.reads
        shares = (percent(reads.measured_sparsity), percent(reads.weight_reads_skipped))
        gains = (f"[bold]{point.decode_speedup:.2f}×[/]", f"{point.speedup_limit:.2f}×")
        dense, sparse = _cells(point.dense, memory.read), _cells(point.sparse, memory.half_read)
        table.add_row(f"dense ({point.dense.precision})", "–", "–", *dense, "", "")
        table.add_row(f"sparse {name} ({point.sparse.precision})", *shares, *sparse, *gains)
        table.add_section()
    return table


def _cells(side: Side, read: float) -> tuple[str, ...]:
    return (
        f"{side.decode.median:.2f}",
        f"{side.decode.p10:.2f} – {side.decode.p90:.2f}",
        f"{side.tokens_per_second:.1f}",
        f"{side.bandwidth / 1e9:.1f}",
        f"{side.bandwidth / read:.0%}",
        f"{side.peak_bytes / 1e6:.0f}",
    )


def _batch_medians(side: Side) -> dict[int, float]:
    return {size: times.median for size, times in side.batches.items()}


def _compare(
    report: BenchReport,
    title: str,
    label: str,
    times: Callable[[Side], Mapping[int, float]],
    ratios: Callable[[Point], Mapping[int, float]],
    digits: int,
) -> Table:
    table = Table(title=title)
    table.add_column(label)
    for size in times(report.points[0].dense):
        table.add_column(str(size), justify="right")
    for point in report.points:
        ratio = ratios(point)
        sparse = (f"{ms:.{digits}f} ({ratio[n]:.2f}×)" for n, ms in times(point.sparse).items())
        table.add_row("dense", *(f"{ms:.{digits}f}" for ms in times(point.dense).values()))
        table.add_row(f"sparse {escape(point.name)}", *sparse)
        table.add_section()
    return table
