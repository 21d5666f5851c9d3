"""A model's decoding, dense and accelerated, in one small table: what the demo ends with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from actsparse.commands.bench.apart import compile_decoders
from actsparse.commands.bench.decoder import make_core, name_processor
from actsparse.commands.bench.prepare import find_source, prepare_dense
from actsparse.commands.bench.results import Quantiles
from actsparse.commands.bench.sparse import make_sparse
from actsparse.commands.bench.timing import CONTEXT_TOKENS, DISCARDED_TOKENS, time_decoding
from actsparse.commands.bench.tokens import CALIBRATION_LENGTH, read_tokens
from actsparse.console.report import make_caption, table_markdown
from actsparse.errors import ActsparseError
from actsparse.openvino.build import extension_path
from actsparse.runtime.environment import count_cores
from actsparse.runtime.progress import Say
from actsparse.storage import assets
from actsparse.texts import Text

DENSE = "dense"
TIMED_TOKENS = 60
_CALIBRATION_BATCHES = 4
_COLUMNS = ("INT8 with OpenVINO", "ms a token", "p10 – p90", "tokens/s", "over dense")


@dataclass(frozen=True)
class DecodingRow:
    """
    How fast one model decodes.

    :param times: Milliseconds for a token.
    """

    name: str
    precision: str
    times: Quantiles


@dataclass(frozen=True)
class DecodingReport:
    """Models that were timed turn by turn."""

    rows: tuple[DecodingRow, ...]
    settings: dict[str, Any]

    def cells(self) -> list[tuple[str, ...]]:
        """Format the rows: a text for each column."""
        return [
            (
                f"{row.name} ({row.precision})",
                f"{row.times.median:.2f}",
                f"{row.times.p10:.2f} – {row.times.p90:.2f}",
                f"{1e3 / row.times.median:.1f}",
                f"{self._speedup(row):.2f}×",
            )
            for row in self.rows
        ]

    def to_table(self) -> Table:
        """Draw the report for a terminal, its settings below."""
        table = Table(title="How fast it decodes", caption=make_caption(self.settings), caption_justify="left")
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="right" if number else "left")
        for cells in self.cells():
            table.add_row(*map(escape, cells))
        return table

    def to_markdown(self) -> str:
        """Write the report as Markdown: a table and its settings."""
        return table_markdown(_COLUMNS, self.cells(), self.settings)

    def to_dict(self) -> dict[str, Any]:
        """Turn the report into what JSON can hold."""
        rows = [
            {
                "name": row.name,
                "precision": row.precision,
                "decode_ms": row.times.to_dict(),
                "tokens_per_second": round(1e3 / row.times.median, 2),
                "speedup": round(self._speedup(row), 3),
            }
            for row in self.rows
        ]
        return {"settings": self.settings, "rows": rows}

    def _speedup(self, row: DecodingRow) -> float:
        return self.rows[0].times.median / row.times.median


def compare_decoding(model: str, targets: Mapping[str, Any], text: Text, calibration: Text, say: Say) -> DecodingReport:
    """
    Decode a text with a model's INT8 form in OpenVINO, dense and accelerated, turn by turn.

    :param model: The model, as for `load_model`.
    :param targets: What to mask, as for `make_sparse`, by name.
    :return: The times, each model with the precision hint that is best for it.
    :raises ActsparseError: If there is no compiler or no optimum-intel, or the model cannot be exported or masked.
    """
    core, threads = make_core(extension_path()), count_cores()
    dense = prepare_dense(find_source(model), "int8", say)
    length = CONTEXT_TOKENS + DISCARDED_TOKENS + TIMED_TOKENS
    if dense.max_length < length:
        msg = f"{model} reads at most {dense.max_length} tokens, and {length} are decoded"
        raise ActsparseError(msg)
    tokens = read_tokens(
        dense,
        text,
        calibration,
        num_batches=_CALIBRATION_BATCHES,
        calibration_length=min(CALIBRATION_LENGTH, dense.max_length),
        length=length,
    )
    with assets.partial_folder() as folder:
        models = {DENSE: dense.xml}
        for number, (name, target) in enumerate(targets.items()):
            say(f"accelerating {name}")
            models[name] = folder / f"sparse{number}.xml"
            make_sparse(core, dense.xml, tokens.calibration, target, is_exact=False, target=models[name])
        say("timing how fast they decode, turn by turn")
        times = time_decoding(
            compile_decoders(core, models, extension_path(), threads, say),
            tokens.measured,
            num_prompt_tokens=CONTEXT_TOKENS,
            num_discarded=DISCARDED_TOKENS,
        )
    settings = {
        "processor": name_processor(core),
        "threads": threads,
        "decoded": f"{TIMED_TOKENS} tokens after {CONTEXT_TOKENS + DISCARDED_TOKENS} others",
    }
    rows = []
    for name in models:
        found = {hint: Quantiles.of(values) for (key, hint), values in times.items() if key == name}
        best = min(found, key=lambda hint: found[hint].median)
        rows.append(DecodingRow(name, best, found[best]))
    return DecodingReport(tuple(rows), settings)
