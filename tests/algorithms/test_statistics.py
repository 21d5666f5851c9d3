"""The sketch of magnitudes: exact counts, nearly exact quantiles, any order, any grouping."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsparse.algorithms.statistics import HIGHEST_EXPONENT, LOWEST_EXPONENT, MANTISSA_BITS, NUM_BINS, MagnitudeSketch

BIN_WIDTH = 2.0**-MANTISSA_BITS
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Magnitudes that a bin of its own can hold; smaller and larger ones share the first and the last bin.
magnitudes = st.floats(2.0 ** (LOWEST_EXPONENT + 1), 2.0 ** (HIGHEST_EXPONENT - 1), width=32) | st.just(0.0)
values = st.lists(magnitudes | magnitudes.map(lambda x: -x), min_size=1, max_size=60)


def counts_of(x: torch.Tensor) -> list[int]:
    return MagnitudeSketch.of(x).counts.tolist()


@given(values=values, q=st.floats(0, 1))
def test_a_quantile_is_within_a_bin_of_torchs(values: list[float], q: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    found = MagnitudeSketch.of(x).quantile(q)
    # torch interpolates between neighbouring order statistics, so the bin is that of one or the other.
    low = torch.quantile(x.abs(), q, interpolation="lower").item()
    ranked = x.abs().sort().values
    below = ranked[max(ranked.tolist().index(low) - 1, 0)].item()
    high = torch.quantile(x.abs(), q, interpolation="higher").item()
    assert below * (1 - BIN_WIDTH) <= found <= high * (1 + BIN_WIDTH)


@given(seed=st.integers(0, 2**31), q=st.floats(0, 1))
def test_the_quantile_of_many_values_is_torchs_within_a_bin(seed: int, q: float) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    found = MagnitudeSketch.of(x).quantile(q)
    # A bin, and the distance between neighbours where they are rare.
    lower, upper = (torch.quantile(x.abs(), min(max(q + step, 0.0), 1.0)).item() for step in (-1 / 3999, 1 / 3999))
    assert lower * (1 - BIN_WIDTH) <= found <= upper * (1 + BIN_WIDTH)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("q", [0.01, 0.1, 0.3, 0.5, 0.77, 0.9, 0.99, 1.0])
def test_the_share_below_the_quantile_is_the_one_asked_for(q: float, dtype: torch.dtype) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(3)).to(dtype)
    threshold = torch.tensor(MagnitudeSketch.of(x).quantile(q)).to(dtype)
    # Half-precision values repeat: one value alone may hold this share of them.
    ties = max(x.abs().unique(return_counts=True)[1].tolist()) / len(x)
    assert (x.abs() <= threshold).double().mean().item() == pytest.approx(q, abs=0.001 + (ties if ties > 1e-3 else 0))


@given(values=values, cut=st.integers(0, 60), seed=st.integers(0, 99))
def test_parts_merged_in_any_order_equal_the_whole(values: list[float], cut: int, seed: int) -> None:
    x = torch.tensor(values)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    merged = MagnitudeSketch.of(shuffled[cut:])
    merged.merge(MagnitudeSketch.of(shuffled[:cut]))
    assert torch.equal(merged.counts, MagnitudeSketch.of(x).counts)
    assert int(merged.counts.sum()) == len(values)


@given(values=values, q1=st.floats(0, 1), q2=st.floats(0, 1))
def test_quantiles_do_not_fall_when_the_share_rises(values: list[float], q1: float, q2: float) -> None:
    sketch = MagnitudeSketch.of(torch.tensor(values))
    assert sketch.quantile(min(q1, q2)) <= sketch.quantile(max(q1, q2))


@given(values=values)
def test_the_quantile_of_everything_masks_everything(values: list[float]) -> None:
    x = torch.tensor(values)
    assert MagnitudeSketch.of(x).quantile(1.0) >= x.abs().max().item()


def test_the_sign_shape_and_layout_do_not_matter() -> None:
    x = torch.randn(4, 5, 6)
    expected = counts_of(x)
    assert counts_of(-x) == counts_of(x.flatten()) == counts_of(x.permute(2, 0, 1)) == expected
    assert counts_of(x.clone().requires_grad_()) == expected


def test_zeros_are_counted_and_their_quantile_is_zero() -> None:
    sketch = MagnitudeSketch.of(torch.tensor([0.0, -0.0, 0.0, 1.0]))
    assert sketch.quantile(0.75) == 0.0
    assert sketch.quantile(0.76) > 0.0


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_an_entry_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 7, dtype=dtype)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        MagnitudeSketch.of(x)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_the_largest_and_smallest_numbers_are_counted(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([info.max, info.min, info.tiny, -info.tiny, 0.0], dtype=dtype)
    assert int(MagnitudeSketch.of(x).counts.sum()) == 5


def test_the_size_does_not_depend_on_the_data() -> None:
    sketches: list[Any] = [MagnitudeSketch(), MagnitudeSketch.of(torch.ones(1)), MagnitudeSketch.of(torch.randn(10**5))]
    assert {sketch.counts.shape for sketch in sketches} == {(NUM_BINS,)}


def test_nothing_has_no_quantile() -> None:
    with pytest.raises(ValueError, match="no activations"):
        MagnitudeSketch().quantile(0.5)


@given(q=st.floats(0.01, 1.0), seed=st.integers(0, 50))
def test_the_share_below_a_quantile_is_that_of_the_quantile(q: float, seed: int) -> None:
    sketch = MagnitudeSketch.of(torch.randn(5000, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5))
    assert sketch.share(sketch.quantile(q)) == pytest.approx(q, abs=1e-3)


def test_shares_count_zeros_and_end_at_one() -> None:
    sketch = MagnitudeSketch.of(torch.tensor([0.0, 0.0, 1.0, -4.0]))
    assert sketch.share(0.0) == 0.5
    assert sketch.share(2.0) == 0.75
    assert sketch.share(1e9) == 1.0
    with pytest.raises(ValueError, match="no activations"):
        MagnitudeSketch().share(1.0)
