"""Hold a case's figures against its reference, tell a regression from noise and from an improvement, and show it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from actsparse.commands.regression.figures import KINDS, CaseResult, Figure
from actsparse.commands.regression.reference import AcceptedFigure, ReferenceCase, Tolerance
from actsparse.errors import SourceError
from actsparse.evaluation.bootstrap import bootstrap_interval

OK, REGRESSION, IMPROVEMENT, SHOWN = "ok", "regression", "improvement", "–"
_STYLES = {REGRESSION: "bold red", IMPROVEMENT: "green"}


@dataclass(frozen=True)
class Difference:
    """
    One figure beside its reference.

    :param reference: What it was; None where the reference has none.
    :param change: By how much it is worse or better: of the figure itself, or with a tolerance by interval the ends of
        the 95% interval of the difference, in nats a token.
    :param tolerance: How much worse it may be; None where it is not judged.
    :param verdict: ``ok``, ``regression``, ``improvement``, or a dash for what is not judged.
    """

    name: str
    reference: Figure | None
    now: Figure
    change: tuple[float, ...]
    tolerance: Tolerance | None
    verdict: str


def compare_case(accepted: ReferenceCase, before: CaseResult, now: CaseResult) -> tuple[Difference, ...]:
    """
    Compare a case's figures with those that were accepted.

    :raises SourceError: If the windows of text differ, or a figure is missing.
    """
    if before.windows.tokens != now.windows.tokens:
        msg = f"{now.name}: the tokenizer cuts the evaluation text into other windows than the reference's"
        raise SourceError(msg)
    missing = next((name for name in accepted.figures if name not in now.figures), None)
    if missing is not None:
        msg = f"{now.name}: the reference has the figure {missing}, which was not measured"
        raise SourceError(msg)
    # People edit the reference's file; its result is another one, and what it lacks has no losses to compare.
    missing = next((name for name in accepted.figures if name not in before.figures), None)
    if missing is not None:
        msg = f"{now.name}: the reference has the figure {missing}, which its result {accepted.result} lacks"
        raise SourceError(msg)
    return tuple(_compare(name, accepted.figures.get(name), before, now) for name in now.figures)


def judge(change: tuple[float, ...], slack: float, bad: str) -> str:
    """
    Judge a change.

    :param change: The change, or the ends of its interval, all of which then have to lie beyond the slack.
    :param bad: Which direction is a regression: ``up``, ``down``, or ``both``.
    """
    is_above, is_below = min(change) > slack, max(change) < -slack
    if not (is_above or is_below):
        return OK
    return REGRESSION if bad == "both" or (bad == "up") == is_above else IMPROVEMENT


def results_table(results: Mapping[str, CaseResult]) -> Table:
    """Draw what was measured."""
    table = _make_table("Figures", "measured")
    for name, result in results.items():
        for figure, value in result.figures.items():
            table.add_row(name, KINDS[figure].title, _show_figure(figure, value))
        table.add_section()
    return table


def differences_table(differences: Mapping[str, tuple[Difference, ...]]) -> Table:
    """Draw what was measured beside the reference."""
    table = _make_table("Against the reference", "reference", "now", "change", "tolerance", "verdict")
    for name, rows in differences.items():
        for row in rows:
            kind = KINDS[row.name]
            before = "–" if row.reference is None else kind.show(row.reference.value)
            cells = (before, kind.show(row.now.value), _show_change(row), _show_tolerance(row), row.verdict)
            table.add_row(name, kind.title, *cells, style=_STYLES.get(row.verdict, ""))
        table.add_section()
    return table


def _compare(name: str, accepted: AcceptedFigure | None, before: CaseResult, now: CaseResult) -> Difference:
    figure, kind = now.figures[name], KINDS[name]
    if accepted is None:
        return Difference(name, None, figure, (), None, SHOWN)
    tolerance = accepted.tolerance
    change: tuple[float, ...] = (figure.value - accepted.value,)
    if tolerance is None:
        return Difference(name, accepted.figure, figure, change, None, SHOWN)
    if tolerance.interval is not None:
        slack = tolerance.interval
        lost = now.windows.token_losses(kind.losses) - before.windows.token_losses(kind.losses)
        change = bootstrap_interval(lost, np.array(now.windows.tokens))
    else:
        slack = (
            tolerance.absolute if tolerance.absolute is not None else (tolerance.relative or 0) * abs(accepted.value)
        )
    return Difference(name, accepted.figure, figure, change, tolerance, judge(change, slack, kind.bad))


def _show_figure(name: str, figure: Figure) -> str:
    show = KINDS[name].show
    ends = "" if figure.low is None or figure.high is None else f" ({show(figure.low)} – {show(figure.high)})"
    return show(figure.value) + ends


def _show_change(row: Difference) -> str:
    if len(row.change) == 2:
        return f"{row.change[0]:+.4f} to {row.change[1]:+.4f} nats"
    if KINDS[row.name].is_share:
        return ", ".join(f"{100 * change:+.2f} points" for change in row.change)
    return ", ".join(f"{change:+.3g}" for change in row.change) or "–"


def _show_tolerance(row: Difference) -> str:
    tolerance = row.tolerance
    if tolerance is None:
        return "–"
    if tolerance.interval is not None:
        return f"interval beyond {tolerance.interval:g} nats"
    if tolerance.relative is not None:
        return f"{100 * tolerance.relative:g}%"
    scale, unit = (100, " points") if KINDS[row.name].is_share else (1, "")
    return f"{scale * (tolerance.absolute or 0):g}{unit}"


def _make_table(title: str, *columns: str) -> Table:
    table = Table("case", "figure", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table
