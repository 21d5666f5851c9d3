"""Results and differences as tables."""

from collections.abc import Mapping

from rich.table import Table

from actsparse.commands.regression.compare import IMPROVEMENT, REGRESSION, Difference
from actsparse.commands.regression.figures import KINDS, CaseResult, Figure

_STYLES = {REGRESSION: "bold red", IMPROVEMENT: "green"}


def results_table(results: Mapping[str, CaseResult]) -> Table:
    """
    Draw what was measured.

    :param results: By case.
    :return: A rich table.
    """
    table = _make_table("Figures", ("case", "figure"), ("measured",))
    for name, result in results.items():
        for figure, value in result.figures.items():
            table.add_row(name, KINDS[figure].title, show_figure(figure, value))
        table.add_section()
    return table


def differences_table(differences: Mapping[str, tuple[Difference, ...]]) -> Table:
    """
    Draw what was measured beside the reference.

    :param differences: By case.
    :return: A rich table.
    """
    table = _make_table(
        "Against the reference", ("case", "figure"), ("reference", "now", "change", "tolerance", "verdict")
    )
    for name, rows in differences.items():
        for row in rows:
            kind = KINDS[row.name]
            before = "–" if row.reference is None else kind.show(row.reference.value)
            cells = (before, kind.show(row.now.value), _show_change(row), _show_tolerance(row), row.verdict)
            table.add_row(name, kind.title, *cells, style=_STYLES.get(row.verdict, ""))
        table.add_section()
    return table


def show_figure(name: str, figure: Figure) -> str:
    """
    Format a figure with its interval.

    :param name: The figure's name.
    :param figure: The figure.
    :return: Such as ``3.2 (3.0 – 3.4)``.
    """
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


def _make_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for column in (*left, *right):
        table.add_column(column, justify="left" if column in left else "right")
    return table
