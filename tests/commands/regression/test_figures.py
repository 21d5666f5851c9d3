"""Figures of the loss, worked out by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from actsparse.commands.regression.figures import DENSE, NNCF, SPARSE, CaseResult, Windows, loss_figures
from actsparse.errors import SourceError


def test_perplexities_are_those_of_the_whole_text() -> None:
    windows = Windows(4, (2.0, 6.0), {DENSE: (4.0, 4.0), SPARSE: (6.0, 10.0), NNCF: (6.0, 2.0)})
    figures = loss_figures(windows)
    assert figures["token_perplexity"].value == pytest.approx(math.exp(2))
    assert figures["word_perplexity"].value == pytest.approx(math.exp(4))
    assert figures["dense_word_perplexity"].value == pytest.approx(math.exp(2))
    assert figures["loss_increase"].value == pytest.approx(1)
    assert figures["loss_over_nncf"].value == pytest.approx(1)
    # Windows of 3 and 5/3 nats a token: no draw leaves these ends.
    assert figures["token_perplexity"].low == pytest.approx(math.exp(10 / 6))
    assert figures["token_perplexity"].high == pytest.approx(math.exp(3))
    assert figures["word_perplexity"].high == pytest.approx(math.exp(6))
    # Both windows lose a nat a token.
    assert figures["loss_increase"].low == pytest.approx(1)
    assert figures["loss_increase"].high == pytest.approx(1)


def test_figures_that_there_are_no_losses_for_are_left_out() -> None:
    assert "nncf_word_perplexity" not in loss_figures(Windows(1, (1.0,), {DENSE: (1.0,), SPARSE: (1.0,)}))


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SourceError, match="2 windows but 1 losses of 'dense'"):
        Windows(1, (1.0, 1.0), {DENSE: (1.0,)})
    with pytest.raises(SourceError, match="a token each"):
        Windows(1, (0.0,), {DENSE: (1.0,)})


@pytest.mark.parametrize(
    ("figure", "side"),
    [
        ("word_perplexity", SPARSE),
        ("dense_token_perplexity", DENSE),
        ("loss_increase", DENSE),
        ("loss_over_nncf", NNCF),
    ],
)
def test_figures_without_the_losses_that_they_come_from_are_refused(
    make_result: Callable[..., CaseResult], figure: str, side: str
) -> None:
    contents: dict[str, Any] = make_result().to_dict()
    contents["figures"] = {figure: {"value": 1.0}}
    contents["windows"]["losses"].pop(side, None)
    with pytest.raises(SourceError, match=f"^it has the figure {figure}, but no losses of '{side}'"):
        CaseResult.from_dict(contents, "it")


def test_a_result_without_figures_is_refused(make_result: Callable[..., CaseResult]) -> None:
    with pytest.raises(SourceError, match="^it has no figures$"):
        CaseResult.from_dict(make_result().to_dict() | {"figures": {}}, "it")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (10**400, r"value of 'sparsity' in figures of it takes a number that a float can hold, not 1000*…"),
        (-(10**400), "that a float can hold"),
        (math.inf, "takes a finite number, not inf"),
        (math.nan, "takes a finite number, not nan"),
    ],
    ids=["large", "low", "infinite", "nan"],
)
def test_numbers_that_no_float_holds_are_refused(
    make_result: Callable[..., CaseResult], value: float, message: str
) -> None:
    contents: dict[str, Any] = make_result().to_dict()
    contents["figures"]["sparsity"]["value"] = value
    with pytest.raises(SourceError, match=message):
        CaseResult.from_dict(contents, "it")
    contents = make_result().to_dict()
    contents["windows"]["tokens"][1] = value
    with pytest.raises(SourceError, match="item 2 of tokens of windows of it takes a"):
        CaseResult.from_dict(contents, "it")
