"""The curves of an attribution study: figures of all questions, as tables, JSON, CSV and plots."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from actsparse.console.plot import make_figure, save_figure
from actsparse.console.report import make_caption, write_json
from actsparse.errors import ActsparseError
from actsparse.evaluation.bootstrap import bootstrap_interval
from actsparse.storage.files import write_bytes

_PLOTS = ("attribution.png", "attribution.pdf")


@dataclass(frozen=True)
class CurvePoint:
    """
    A metric at one ratio, over all questions.

    :param mode: How units were chosen: ``oracle`` or ``static``.
    :param where: What was masked: ``heads``, ``neurons`` or ``both``.
    :param sparsity: The measured share of weights, of all attention and feed-forward networks, that were useless.
    :param bleu: Corpus BLEU of the masked model's texts against the dense model's, 0 to 100.
    :param kl_divergence: KL(dense ‖ masked) on the dense model's texts, nats a token.
    :param kl_low: Where its 95% interval over questions begins.
    """

    mode: str
    metric: str
    where: str
    ratio: float
    sparsity: float
    bleu: float
    exact_match: float
    kl_divergence: float
    kl_low: float
    kl_high: float
    agreement: float


@dataclass(frozen=True)
class Curves:
    """
    The curves of a study.

    :param environments: With what; more than one where a study was gone on with elsewhere.
    """

    points: tuple[CurvePoint, ...]
    settings: dict[str, Any]
    environments: tuple[dict[str, Any], ...]

    @classmethod
    def of(
        cls, lines: Mapping[Any, list[dict[str, Any]]], ratios: Sequence[float], settings: dict[str, Any]
    ) -> "Curves":
        """
        Sum up.

        :param lines: For each mode, metric and kind of units, what was measured of each chunk of the questions.
        """
        points = []
        for line, chunks in lines.items():
            for ratio in ratios:
                rows = [row for chunk in chunks for row in chunk["rows"] if row["ratio"] == ratio]
                points.append(_sum_up(tuple(line), ratio, rows))
        environments = [chunk["environment"] for chunks in lines.values() for chunk in chunks]
        different = tuple(x for i, x in enumerate(environments) if x not in environments[:i])
        return cls(tuple(points), settings, different)

    def to_tables(self) -> list[Table]:
        """
        Draw the curves for a terminal.

        :return: A table of BLEU and one of divergence, a line for each metric.
        """
        caption = make_caption(self.settings)
        bleu = self._draw("BLEU against the dense model's own texts", lambda p: f"{p.bleu:.1f}")
        divergence = self._draw("KL to the dense model on its texts, nats a token", lambda p: f"{p.kl_divergence:.3f}")
        divergence.caption, divergence.caption_justify = caption, "left"
        return [bleu, divergence]

    def write(self, folder: Path) -> None:
        """
        Write attribution.json, .csv, .png and .pdf.

        :raises OutputError: If a file cannot be written.
        """
        write_json(folder / "attribution.json", self.to_dict())
        rows = [asdict(point) for point in self.points]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_bytes(folder / "attribution.csv", text.getvalue().encode())
        for name in _PLOTS:
            self._plot(folder / name)

    def to_dict(self) -> dict[str, Any]:
        """Turn the curves into what JSON can hold."""
        points = [asdict(point) for point in self.points]
        return {"settings": self.settings, "points": points, "environments": list(self.environments)}

    def _plot(self, path: Path) -> None:
        """Draw a panel for each mode and kind of units and in it a line for each metric."""
        titles = list(dict.fromkeys((point.mode, point.where) for point in self.points))
        metrics = list(dict.fromkeys(point.metric for point in self.points))
        figure = make_figure(path, (5.5 * len(titles), 4))
        panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
        for panel, title in zip(panels, titles, strict=True):
            for number, metric in enumerate(metrics):
                line = [p for p in self.points if (p.mode, p.where, p.metric) == (*title, metric)]
                x, y = [100 * point.ratio for point in line], [point.bleu for point in line]
                panel.plot(x, y, marker="o", markersize=4, linewidth=1.2, color=f"C{number}", label=metric)
            panel.set(title=", ".join(title), xlabel="units switched off, %", xlim=(-2, 102), ylim=(0, 103))
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("BLEU against the dense model")
        panels[0].legend(fontsize="small")
        save_figure(figure, path)

    def _draw(self, title: str, cell: Any) -> Table:
        table = Table(title=title)
        for name in ("mode", "metric", "masked"):
            table.add_column(name)
        ratios = list(dict.fromkeys(point.ratio for point in self.points))
        for ratio in ratios:
            table.add_column(f"{100 * ratio:g}%", justify="right")
        lines = dict.fromkeys((point.mode, point.metric, point.where) for point in self.points)
        for line in lines:
            points = [p for p in self.points if (p.mode, p.metric, p.where) == line]
            table.add_row(*line, *(cell(point) for point in points))
        return table


def require_sacrebleu() -> None:
    """
    Check that texts can be compared, before any work is done.

    :raises ActsparseError: If sacrebleu is not installed.
    """
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        msg = "BLEU needs sacrebleu, which is not installed: pip install 'actsparse[eval]'"
        raise ActsparseError(msg) from None


def _sum_up(line: tuple[str, ...], ratio: float, rows: list[dict[str, Any]]) -> CurvePoint:
    import sacrebleu

    answers, references, tokens, divergence, agreement = (
        [x for row in rows for x in row[name]]
        for name in ("answers", "references", "tokens", "divergence", "agreement")
    )
    weights = np.array(tokens, dtype=np.float64)
    low, high = bootstrap_interval(np.array(divergence) / weights, weights)
    counts = np.array([sum(row["tokens"]) for row in rows])
    return CurvePoint(
        *line,
        ratio=ratio,
        sparsity=float((np.array([row["sparsity"] for row in rows]) * counts).sum() / counts.sum()),
        bleu=sacrebleu.corpus_bleu(answers, [references]).score,
        exact_match=sum(a == r for a, r in zip(answers, references, strict=True)) / len(answers),
        kl_divergence=sum(divergence) / sum(tokens),
        kl_low=low,
        kl_high=high,
        agreement=sum(agreement) / sum(tokens),
    )
