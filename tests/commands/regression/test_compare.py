"""Verdicts: what is a regression, what is noise, what is an improvement, and what cannot be compared."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsparse.commands.regression.compare import IMPROVEMENT, OK, REGRESSION, SHOWN, compare_case, judge
from actsparse.commands.regression.figures import KINDS, NNCF, SPARSE, CaseResult, loss_figures
from actsparse.commands.regression.reference import DEFAULTS, ReferenceCase, Tolerance, accept_figures
from actsparse.errors import SourceError

MakeResult = Callable[..., CaseResult]


def verdicts(
    before: CaseResult, now: CaseResult, tolerances: dict[str, Tolerance | None] | None = None
) -> dict[str, str]:
    chosen = DEFAULTS if tolerances is None else tolerances
    accepted = ReferenceCase("small.yaml", "small.json", accept_figures(before.figures, chosen))
    return {row.name: row.verdict for row in compare_case(accepted, before, now)}


def test_equal_figures_are_never_a_regression(make_result: MakeResult) -> None:
    for tolerance in (Tolerance(absolute=1e-5), Tolerance(relative=1e-5), Tolerance(interval=0)):
        names = [name for name, kind in KINDS.items() if kind.losses or tolerance.interval is None]
        found = verdicts(make_result(), make_result(), dict.fromkeys(names, tolerance))
        assert {found[name] for name in found if name in names} == {OK}


def test_a_worse_loss_is_caught_and_noise_is_not(make_result: MakeResult) -> None:
    before = make_result()
    for seed in range(10):
        assert verdicts(before, make_result(0.0, 0.03, seed=seed))["word_perplexity"] == OK
        assert verdicts(before, make_result(0.06, 0.03, seed=seed))["word_perplexity"] == REGRESSION
        assert verdicts(before, make_result(-0.06, 0.03, seed=seed))["word_perplexity"] == IMPROVEMENT
        # The same change without pairing would drown in how hard the windows are.
        assert before.figures["word_perplexity"].high is not None


def test_sparsity_may_move_neither_way(make_result: MakeResult) -> None:
    before = make_result(sparsity=0.5)
    for sparsity, verdict in ((0.509, OK), (0.491, OK), (0.511, REGRESSION), (0.489, REGRESSION)):
        assert verdicts(before, make_result(sparsity=sparsity))["sparsity"] == verdict


def test_relative_tolerances_scale_with_the_reference(make_result: MakeResult) -> None:
    before = make_result(ratio=2.0)
    for ratio, verdict in ((2.9, OK), (3.1, REGRESSION), (0.9, IMPROVEMENT)):
        assert verdicts(before, make_result(ratio=ratio))["calibration_ratio"] == verdict


def test_what_has_no_tolerance_is_shown_and_not_judged(make_result: MakeResult) -> None:
    assert verdicts(make_result(), make_result(9.0), {})["word_perplexity"] == SHOWN


def test_other_windows_or_a_missing_figure_cannot_be_compared(make_result: MakeResult) -> None:
    before, now = make_result(), make_result()
    fewer = {name: losses[1:] for name, losses in now.windows.losses.items()}
    with pytest.raises(SourceError, match="other windows"):
        verdicts(before, replace(now, windows=replace(now.windows, tokens=now.windows.tokens[1:], losses=fewer)))
    with pytest.raises(SourceError, match="sparsity, which was not measured"):
        verdicts(before, replace(now, figures={k: v for k, v in now.figures.items() if k != "sparsity"}))


def test_a_reference_that_has_more_than_its_result_cannot_be_compared(make_result: MakeResult) -> None:
    result = make_result()
    losses = result.windows.losses | {NNCF: result.windows.losses[SPARSE]}
    windows = replace(result.windows, losses=losses)
    now = replace(result, figures=result.figures | loss_figures(windows), windows=windows)
    bounds = accept_figures(now.figures, {"nncf_word_perplexity": Tolerance(interval=0)})
    with pytest.raises(SourceError, match="figure nncf_word_perplexity, which its result small.json lacks"):
        compare_case(ReferenceCase("small.yaml", "small.json", bounds), result, now)


@given(
    change=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    slack=st.floats(0, 1),
    more=st.floats(0, 1),
    bad=st.sampled_from(["up", "down", "both"]),
)
def test_verdicts_are_monotone_and_mirror_each_other(
    change: tuple[float, float], slack: float, more: float, bad: str
) -> None:
    verdict = judge(change, slack, bad)
    if verdict == OK:
        assert judge(change, slack + more, bad) == OK
    mirrored = judge((-change[0], -change[1]), slack, {"up": "down", "down": "up", "both": "both"}[bad])
    assert mirrored == verdict
