"""Hold a case's figures against its reference, and tell a regression from noise and from an improvement."""

from dataclasses import dataclass

import numpy as np

from actsparse.commands.regression.figures import KINDS, CaseResult, Figure
from actsparse.commands.regression.reference import Bound, ReferenceCase
from actsparse.commands.regression.tolerance import Tolerance
from actsparse.errors import SourceError
from actsparse.evaluation.bootstrap import bootstrap_interval

OK, REGRESSION, IMPROVEMENT, SHOWN = "ok", "regression", "improvement", "–"


@dataclass(frozen=True)
class Difference:
    """
    One figure beside its reference.

    :param name: The figure.
    :param reference: What it was; None where the reference has none.
    :param now: What it is.
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

    :param accepted: The figures, with their tolerances.
    :param before: What was measured then, window by window.
    :param now: What was measured now.
    :return: A difference for each figure.
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
    differences = []
    for name, figure in now.figures.items():
        bound = accepted.figures.get(name)
        if bound is None:
            differences.append(Difference(name, None, figure, (), None, SHOWN))
        else:
            differences.append(_compare(name, bound, figure, before, now))
    return tuple(differences)


def _compare(name: str, bound: Bound, figure: Figure, before: CaseResult, now: CaseResult) -> Difference:
    tolerance = bound.tolerance
    if tolerance is not None and tolerance.interval is not None:
        change = _paired_interval(name, before, now)
        verdict = judge(change, tolerance.interval, KINDS[name].bad)
        return Difference(name, bound.figure, figure, change, tolerance, verdict)
    change = (figure.value - bound.value,)
    if tolerance is None:
        return Difference(name, bound.figure, figure, change, None, SHOWN)
    slack = tolerance.absolute if tolerance.absolute is not None else (tolerance.relative or 0) * abs(bound.value)
    return Difference(name, bound.figure, figure, change, tolerance, judge(change, slack, KINDS[name].bad))


def judge(change: tuple[float, ...], slack: float, bad: str) -> str:
    """
    Judge a change.

    :param change: The change, or the ends of its interval, all of which then have to lie beyond the slack.
    :param slack: How far it may go.
    :param bad: Which direction is a regression: ``up``, ``down``, or ``both``.
    :return: The verdict.
    """
    is_above, is_below = min(change) > slack, max(change) < -slack
    if not (is_above or is_below):
        return OK
    return REGRESSION if bad == "both" or (bad == "up") == is_above else IMPROVEMENT


def _paired_interval(name: str, before: CaseResult, now: CaseResult) -> tuple[float, float]:
    losses = KINDS[name].losses
    change = now.windows.token_losses(losses) - before.windows.token_losses(losses)
    return bootstrap_interval(change, np.array(now.windows.tokens))
