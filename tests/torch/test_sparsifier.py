"""The mask itself: what NNCF's does, on any number, in two ways that agree bit for bit."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nncf.experimental.torch.sparsify_activations.torch_backend import ActivationsSparsifier as NncfSparsifier

from actsparse.mask import mask_small
from actsparse.torch.sparsifier import ActivationSparsifier

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 6e4, 1e-7)
THRESHOLDS = (-math.inf, 0.0, 0.5, 1.0, 1e-7, 0.1)

by_type = pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)


def bits(x: torch.Tensor) -> torch.Tensor:
    """View floats as integers, so that NaN equals NaN and 0.0 does not equal -0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def mask_as_nncf(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    sparsifier = NncfSparsifier(target_sparsity=0.5)
    sparsifier.running_threshold = threshold.to(x.dtype)
    return sparsifier(x)


def make_sparsifier(threshold: float | torch.Tensor, **settings: str) -> ActivationSparsifier:
    value = torch.as_tensor(threshold)
    sparsifier = ActivationSparsifier(0.5, channels=value.numel() if value.ndim else None, **settings)  # pyright: ignore
    sparsifier.threshold.copy_(value)
    return sparsifier


floats = st.floats(width=32) | st.sampled_from(SPECIAL)


@by_type
@given(values=st.lists(floats, min_size=1, max_size=70), threshold=st.floats(0, 1e4, width=32) | st.just(-math.inf))
def test_it_masks_what_nncf_masks(dtype: torch.dtype, values: list[float], threshold: float) -> None:
    x = torch.tensor(values).to(dtype)
    assert torch.equal(bits(mask_small(x, torch.tensor(threshold))), bits(mask_as_nncf(x, torch.tensor(threshold))))


@by_type
@given(data=st.data())
def test_entries_equal_to_the_threshold_are_masked(dtype: torch.dtype, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=20))
    x = torch.tensor(values).to(dtype)
    threshold = x[data.draw(st.integers(0, len(values) - 1))].abs()
    masked = mask_small(x, threshold)
    assert not masked[x.abs() <= threshold].any()
    assert torch.equal(masked[x.abs() > threshold], x[x.abs() > threshold])


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x,
    "every third": lambda x: x[..., ::3],
    "transposed": lambda x: x.transpose(-1, -2),
    "few": lambda x: x[..., :3],
    "one": lambda x: x[:1, :1],
    "none": lambda x: x[:0],
}


@by_type
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fast_way_equals_the_traced_way_bit_for_bit(dtype: torch.dtype, threshold: float, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 13 * len(SPECIAL), generator=generator)
    x[:, : len(SPECIAL)] = torch.tensor(SPECIAL)
    x = LAYOUTS[layout](x.to(dtype))
    zero_d = torch.tensor(threshold)
    fast = mask_small(x, zero_d)
    # One threshold per channel takes the way that is also traced.
    general = mask_small(x, zero_d.expand(x.shape[-1]))
    assert torch.equal(bits(fast), bits(general))
    assert torch.equal(bits(fast), bits(mask_as_nncf(x, zero_d)))
    assert fast.dtype == dtype


@by_type
def test_each_channel_has_its_own_threshold(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=generator).to(dtype)
    thresholds = torch.tensor([-math.inf, 0.0, 0.1, 0.3, 0.5, 1.0, 2.0, 100.0])
    masked = make_sparsifier(thresholds)(x)
    for channel, threshold in enumerate(thresholds):
        assert torch.equal(bits(masked[..., channel]), bits(mask_as_nncf(x[..., channel], threshold)))


@by_type
def test_a_new_sparsifier_masks_nothing(dtype: torch.dtype) -> None:
    x = torch.tensor(SPECIAL).to(dtype).reshape(1, -1)
    assert torch.equal(bits(ActivationSparsifier(0.5)(x)), bits(x))
    assert torch.equal(bits(ActivationSparsifier(0.5, channels=len(SPECIAL))(x)), bits(x))


def test_the_input_is_not_changed() -> None:
    x = torch.randn(4, 8)
    before = x.clone()
    make_sparsifier(0.5)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 1, 8), (1, 8)], ids=str)
def test_decode_masks_a_single_new_token(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.1)
    assert not make_sparsifier(0.5, tokens="decode")(x).any()


@pytest.mark.parametrize("shape", [(1, 2, 8), (3, 7, 8), (2, 8), (1, 0, 8)], ids=str)
def test_decode_passes_several_tokens(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.1)
    assert make_sparsifier(0.5, tokens="decode")(x) is x
    assert not make_sparsifier(0.5, tokens="all")(x).any()


def test_a_suspended_mask_passes_everything() -> None:
    sparsifier = make_sparsifier(0.5)
    sparsifier.is_active = False
    x = torch.full((2, 8), 0.1)
    assert sparsifier(x) is x


def test_the_threshold_is_its_only_state_and_no_parameter() -> None:
    sparsifier = make_sparsifier(0.5)
    assert list(sparsifier.state_dict()) == ["threshold"]
    assert not list(sparsifier.parameters())


def test_copies_and_pickles_keep_their_own_threshold() -> None:
    sparsifier = make_sparsifier(0.5, tokens="decode")
    for twin in (copy.deepcopy(sparsifier), pickle.loads(pickle.dumps(sparsifier))):
        assert torch.equal(twin.threshold, sparsifier.threshold)
        assert repr(twin) == repr(sparsifier)
        twin.threshold.fill_(9.0)
        assert sparsifier.threshold.item() == 0.5


@by_type
def test_gradients_pass_where_entries_pass(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.1, 2.0, -3.0]], dtype=dtype, requires_grad=True)
    make_sparsifier(0.5)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0]]
