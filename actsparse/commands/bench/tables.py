"""A benchmark's tables for the terminal."""

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from actsparse.commands.bench.results import BenchReport, Point, Side
from actsparse.console.report import percent

_COLUMNS = (
    "",
    "measured",
    "reads skipped",
    "ms/token",
    "p10 – p90",
    "tokens/s",
    "GB/s",
    "of reading",
    "peak MB",
    "speed-up",
    "limit",
)


def make_tables(report: BenchReport) -> list[Table]:
    """
    Draw a report.

    :param report: What was measured.
    :return: A table of decoding, one of batches where there were any, and one of times to first token.
    """
    has_batches = bool(report.points[0].batch_speedup)
    return [_decode_table(report), *([_batch_table(report)] if has_batches else []), _first_token_table(report)]


def describe_target(point: Point) -> str:
    """
    Name what was asked of a point.

    :param point: The point.
    :return: Such as ``50%`` or ``ffn.down=0.5``.
    """
    if isinstance(point.target, str):
        return point.target
    if isinstance(point.target, Mapping):
        return ", ".join(f"{name}={value:g}" for name, value in point.target.items())
    return percent(point.target).replace(".0%", "%")


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
        name, reads = escape(describe_target(point)), point.reads
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


def _batch_table(report: BenchReport) -> Table:
    table = Table(title="Decoding several sequences at once, ms for a token of each (in brackets: speed-up)")
    table.add_column("sequences")
    for size in report.points[0].dense.batches:
        table.add_column(str(size), justify="right")
    for point in report.points:
        speedups, sparse = point.batch_speedup, point.sparse.batches
        table.add_row("dense", *(f"{times.median:.1f}" for times in point.dense.batches.values()))
        cells = (f"{sparse[n].median:.1f} ({speedup:.2f}×)" for n, speedup in speedups.items())
        table.add_row(f"sparse {escape(describe_target(point))}", *cells)
        table.add_section()
    return table


def _first_token_table(report: BenchReport) -> Table:
    table = Table(title="Time to first token, ms (in brackets: sparse over dense)")
    table.add_column("prompt, tokens")
    for length in report.points[0].dense.ttft:
        table.add_column(str(length), justify="right")
    for point in report.points:
        ratios, sparse = point.ttft_ratio, point.sparse.ttft
        table.add_row("dense", *(f"{ms:.0f}" for ms in point.dense.ttft.values()))
        cells = (f"{sparse[n]:.0f} ({ratio:.2f}×)" for n, ratio in ratios.items())
        table.add_row(f"sparse {escape(describe_target(point))}", *cells)
        table.add_section()
    return table
