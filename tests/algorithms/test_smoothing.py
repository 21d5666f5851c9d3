"""Noisy figures are drawn towards those of parts alike, and steady ones are left as they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsparse.algorithms import LayerGroup
from actsparse.algorithms.smoothing import make_covariance, regress, smooth

ROLES = ("attention.qkv", "ffn.gate", "ffn.down")
GROUPS = [LayerGroup(f"{i}.{role}", (f"{i}.{role}",), 64, (1e4,), role=role) for i in range(8) for role in ROLES]
INFINITE = torch.full((len(GROUPS),), float("inf"), dtype=torch.float64)


def figures(seed: int = 0) -> torch.Tensor:
    """Draw figures of parts as the prior has them."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(make_covariance(GROUPS))
    return 1 + 0.3 * root @ torch.randn(len(GROUPS), generator=generator, dtype=torch.float64)


def test_the_covariance_is_one() -> None:
    covariance = make_covariance(GROUPS)
    assert torch.equal(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance).min() > 0
    # One role nearby, one role far off, another role nearby, another role far off.
    assert covariance[0, 3] > covariance[0, 21] > covariance[0, 22]
    assert covariance[0, 3] > covariance[0, 1] > covariance[0, 22]


def test_what_is_known_stays_and_what_is_not_is_the_usual() -> None:
    true = figures()
    assert torch.allclose(smooth(GROUPS, true, torch.zeros_like(true)), true / true.mean(), atol=0.1)
    assert torch.equal(smooth(GROUPS, true, INFINITE), torch.ones_like(true))


def test_what_could_not_be_measured_is_told_by_its_like() -> None:
    values = torch.tensor([3.0 if part.role == "ffn.down" else 1.0 for part in GROUPS], dtype=torch.float64)
    errors = torch.full_like(values, 0.01)
    missing = next(i for i, part in enumerate(GROUPS) if part.role == "ffn.down" and i > 10)
    values[missing], errors[missing] = 0.0, float("inf")
    found = smooth(GROUPS, values, errors)
    assert found[missing] > 1.3
    assert all(found[i] < 1.0 for i, part in enumerate(GROUPS) if part.role != "ffn.down")


@given(st.integers(0, 1000))
def test_smoothing_brings_noisy_figures_nearer_to_the_true_ones(seed: int) -> None:
    true = figures(seed)
    noise = torch.randn(len(GROUPS), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    noisy = true + noise
    found = smooth(GROUPS, 7e-5 * noisy, torch.full_like(noisy, 7e-5))
    assert (found - true).square().mean() < (noisy - true).square().mean()


def trials(true: torch.Tensor, count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    moved = 0.01 * torch.randn(count, len(GROUPS), generator=generator, dtype=torch.float64)
    found = 5 * moved @ true + noise * torch.randn(count, generator=generator, dtype=torch.float64)
    groups = torch.arange(count) // 12
    # What is hard of a group of trials is common to them.
    return moved, found + 3.0 * groups, groups


def test_regression_finds_what_moves_do() -> None:
    true = figures(3)
    found = regress(GROUPS, *trials(true, 240, 1e-3))
    relative = true / true.mean()
    assert torch.corrcoef(torch.stack([found, relative]))[0, 1] > 0.9
    assert (found - relative).square().mean() < (1 - relative).square().mean() / 2


def test_regression_makes_little_of_noise() -> None:
    moved, found, groups = trials(torch.ones(len(GROUPS), dtype=torch.float64), 96, 0.1)
    assert (regress(GROUPS, moved, found, groups) - 1).abs().max() < 0.5


@pytest.mark.parametrize("slope", [0.0, -1.0])
def test_trials_that_tell_nothing_change_nothing(slope: float) -> None:
    moved, _, groups = trials(torch.ones(len(GROUPS), dtype=torch.float64), 48, 0.0)
    found = slope * moved.sum(1)
    assert torch.equal(regress(GROUPS, moved, found, groups), torch.ones(len(GROUPS), dtype=torch.float64))
