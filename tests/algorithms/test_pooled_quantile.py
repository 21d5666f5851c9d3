"""The pooled quantile: it belongs to the data, not to its order or its batches."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsparse import TargetScope, measure_sparsity, sparsify_activations
from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.torch.insertion import named_sparsifiers


def make_sequences(num_sequences: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_sequences, 5, 8, generator=torch.Generator().manual_seed(seed))


def estimate(batches: list[torch.Tensor], *targets: float) -> list[float]:
    estimator = PooledQuantile(targets)
    for batch in batches:
        estimator.update(batch)
    return [estimator.threshold(target).item() for target in targets]


def thresholds_of(model: Any) -> dict[str, float]:
    return {name: sparsifier.threshold.item() for name, sparsifier in named_sparsifiers(model)}


def test_a_threshold_computed_by_hand() -> None:
    x = torch.arange(1.0, 9.0).reshape(1, 2, 4)
    low, half, whole = estimate([x], 0.125, 0.5, 1.0)
    # Of the magnitudes 1 … 8, a half does not exceed 4: the threshold lies in the bin that starts there.
    assert 1.0 <= low < 1.002
    assert 4.0 <= half < 4.01
    assert 8.0 <= whole < 8.02


@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5)), target=st.floats(0.01, 1))
def test_neither_order_nor_batches_matter(order: list[int], cuts: set[int], target: float) -> None:
    x = make_sequences()
    edges = [0, *sorted(cuts), 6]
    batches = [x[order][i:j] for i, j in zip(edges, edges[1:], strict=False)]
    assert estimate(batches, target) == estimate([x], target)


def test_it_is_the_quantile_of_the_merged_sketches() -> None:
    parts = [make_sequences(3, seed) for seed in range(4)]
    sketch = MagnitudeSketch()
    for part in reversed(parts):
        sketch.merge(MagnitudeSketch.of(part))
    assert estimate(parts, 0.3) == [torch.tensor(sketch.quantile(0.3)).item()]


@given(data=st.data())
def test_a_sequence_is_masked_alike_in_any_company(data: st.DataObject) -> None:
    x = make_sequences()
    size = data.draw(st.integers(1, 6))
    target = data.draw(st.floats(0.05, 0.95))
    together, alone = PooledQuantile((target,)), PooledQuantile((target,))
    together.update(x[:size])
    masked = together.mask_batch(x[:size], target)
    for number in range(size):
        alone.update(x[number : number + 1])
        assert torch.equal(alone.mask_batch(x[number : number + 1], target), masked[number : number + 1])


@pytest.mark.parametrize("shape", [(40, 8), (1, 40, 8), (5, 8, 8), (2, 3, 5, 8)], ids=str)
def test_a_masked_batch_has_the_shape_and_the_share_of_zeros_asked_for(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    estimator = PooledQuantile((0.5,))
    estimator.update(x)
    masked = estimator.mask_batch(x, 0.5)
    assert masked.shape == x.shape
    for part in masked.flatten(0, -3) if x.ndim > 2 else [masked]:
        assert (part == 0).double().mean().item() == pytest.approx(0.5, abs=1.5 / part.numel())
    assert torch.equal(masked[masked != 0], x[masked != 0])


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_a_models_thresholds_do_not_depend_on_order_or_batch_size(
    architecture: str, target: float, make_model: Any, make_batches: Any
) -> None:
    tokens = torch.cat([batch["input_ids"] for batch in make_batches()])
    orders = [torch.arange(8), torch.arange(8).flip(0), torch.randperm(8, generator=torch.Generator().manual_seed(5))]
    results = []
    for order in orders:
        data = [{"input_ids": tokens[part]} for part in order.split(1)]
        results.append(thresholds_of(sparsify_activations(make_model(architecture), data, target)))
    assert results[0] == results[1] == results[2]
    # OPT's feed-forward network gets the sequences of a batch as one, so its batches cannot be told apart.
    for size in () if architecture == "opt" else (2, 8):
        data = [{"input_ids": part} for part in tokens.split(size)]
        found = thresholds_of(sparsify_activations(make_model(architecture), data, target))
        # Matrix products of other shapes round otherwise, which is all that may differ.
        assert found == pytest.approx(results[0], rel=2e-3)


def test_layers_of_one_site_can_have_targets_of_their_own(llama: Any, batches: list[Any]) -> None:
    targets = {TargetScope(roles=("ffn.gate",)): 0.3, TargetScope(roles=("ffn.up",)): 0.6}
    sparsify_activations(llama, batches, targets)
    measured = {x.name.rpartition(".")[2]: x.sparsity for x in measure_sparsity(llama, batches).layers[:2]}
    assert measured == pytest.approx({"gate_proj": 0.3, "up_proj": 0.6}, abs=0.005)
