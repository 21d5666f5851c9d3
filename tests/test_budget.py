"""A limit on perplexity: kept on the held-out text, by as much sparsity as it allows, in few steps."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from actsparse import budget
from actsparse.budget import MAX_EVALUATIONS, sparsify_to_perplexity
from actsparse.errors import ActsparseError
from actsparse.scopes import TargetScope
from actsparse.torch.insertion import named_sparsifiers


@dataclass
class Known:
    """A comparison whose loss is known."""

    loss_increase: float
    dense: Any = None


def search(monkeypatch: pytest.MonkeyPatch, loss: Any, limit: float) -> tuple[Any, list[float]]:
    """Search where the loss is a given function of the target."""
    calibrated: list[float] = []
    monkeypatch.setattr(budget, "calibrate", lambda _model, _data, target, *_rest: calibrated.append(target))
    monkeypatch.setattr(budget, "compare_losses", lambda *_args, **_kwargs: Known(loss(calibrated[-1])))
    monkeypatch.setattr(budget, "remove_sparsifiers", lambda _model: calibrated.append(math.nan))
    return sparsify_to_perplexity(None, None, [], [], max_perplexity_increase=limit), calibrated


@pytest.mark.parametrize("limit", [0.001, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("power", [1.5, 3, 6])
def test_it_finds_the_sparsity_of_a_smooth_loss(monkeypatch: pytest.MonkeyPatch, limit: float, power: float) -> None:
    result, calibrated = search(monkeypatch, lambda s: 2 * s**power, limit)
    truth = (math.log1p(limit) / 2) ** (1 / power)
    assert result.best.target == pytest.approx(min(truth, 1), abs=0.02)
    assert result.best.perplexity_increase <= limit
    assert len(result.steps) <= 10
    assert calibrated[-1] == result.best.target


def test_a_noisy_loss_ends_in_time_and_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(s: float) -> float:
        return 0.8 * s**4 + 0.003 * math.sin(1e4 * s)

    for limit in (0.005, 0.01, 0.03):
        result, _ = search(monkeypatch, noisy, limit)
        assert len(result.steps) <= MAX_EVALUATIONS
        assert result.best.perplexity_increase <= limit


def test_where_nothing_is_allowed_no_mask_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    result, calibrated = search(monkeypatch, lambda _s: 1.0, 0.01)
    assert result.best is None
    assert math.isnan(calibrated[-1])
    assert len(result.steps) <= MAX_EVALUATIONS


def test_where_all_is_allowed_nearly_all_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = search(monkeypatch, lambda _s: -0.1, 0.01)
    assert result.best.target > 0.99


@pytest.mark.parametrize("limit", [0, -0.1, math.inf, math.nan, "1%", True])
def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ActsparseError, match="must be a positive number"):
        sparsify_to_perplexity(None, None, [], [], max_perplexity_increase=limit)


def test_a_real_model_keeps_the_limit(small_language_model: Any) -> None:
    model, tokenizer, pages, batches = small_language_model
    said: list[str] = []
    result = sparsify_to_perplexity(
        model,
        tokenizer,
        batches,
        pages,
        max_perplexity_increase=0.02,
        scopes=[TargetScope(roles=("ffn.down",))],
        max_length=64,
        say=said.append,
    )
    assert result.best is not None
    assert result.best.perplexity_increase <= 0.02
    masks = dict(named_sparsifiers(model))
    assert {mask.target_sparsity for mask in masks.values()} == {result.best.target}
    assert all(name.endswith("down_proj") for name in masks)
    assert len(said) == len(result.steps)
