"""What holds for every algorithm, whichever is added."""

import copy
from typing import Any

import pytest
import torch

from actsparse import ActsparseError, TargetScope, measure_sparsity, sparsify_activations
from actsparse.algorithms import ALGORITHMS, ESTIMATORS, get_algorithm
from actsparse.torch.insertion import named_sparsifiers

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
# The layers that read the first block's first site: nothing masked comes before them.
FIRST = TargetScope(patterns=[r"model\.layers\.0\.self_attn\.[qkv]_proj"])


# Those that give every site its target.
UNIFORM = [name for name in ALGORITHMS if get_algorithm(name).allocation in ("uniform", *ESTIMATORS)]


@pytest.fixture(params=UNIFORM)
def algorithm(request: pytest.FixtureRequest) -> str:
    return request.param


def calibrate(model: Any, batches: list[Any], target: Any, algorithm: str) -> dict[str, torch.Tensor]:
    sparsify_activations(model, batches, target, algorithm=algorithm)
    return {name: sparsifier.threshold for name, sparsifier in named_sparsifiers(model)}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_site_with_more_sparsity_has_higher_thresholds(algorithm: str, make_model: Any, batches: list[Any]) -> None:
    found = [next(iter(calibrate(make_model(), batches, {FIRST: target}, algorithm).values())) for target in TARGETS]
    for lower, higher in zip(found, found[1:], strict=False):
        assert (lower < higher).all()


def test_an_estimator_with_several_targets_keeps_their_order(algorithm: str) -> None:
    generator = torch.Generator().manual_seed(0)
    estimator = get_algorithm(algorithm).make_estimator(TARGETS[1:], None)
    for _ in range(5):
        estimator.update(torch.randn(2, 9, 16, generator=generator))
    found = [estimator.threshold(target) for target in TARGETS[1:]]
    assert all((lower <= higher).all() for lower, higher in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize("target", [0.1, 0.5, 0.9, 1.0])
def test_the_target_is_met_on_the_calibration_data(
    algorithm: str, target: float, dtype: torch.dtype, make_model: Any, make_batches: Any
) -> None:
    # One sequence: a rule that looks at batches one by one is then exact too.
    batches = make_batches(1, batch_size=1, length=48)
    model = make_model(dtype=dtype)
    calibrate(model, batches, target, algorithm)
    # Half precision rounds so coarsely that one value alone holds up to one hundredth of all.
    tolerance = {torch.float32: 0.002, torch.float16: 0.003, torch.bfloat16: 0.012}[dtype]
    for layer in measure_sparsity(model, batches).layers:
        assert layer.sparsity == pytest.approx(target, abs=tolerance), layer.name


def test_the_target_is_met_on_every_architecture(
    algorithm: str, architecture: str, make_model: Any, make_batches: Any
) -> None:
    batches = make_batches(1, batch_size=1, length=48)
    model = make_model(architecture)
    calibrate(model, batches, 0.4, algorithm)
    thresholds = {name: sparsifier.threshold for name, sparsifier in named_sparsifiers(model)}
    for layer in measure_sparsity(model, batches).layers:
        threshold = thresholds[layer.name]
        # Where an activation function gives more zeros than were asked for, the threshold is 0.
        is_met = layer.sparsity == pytest.approx(0.4, abs=0.002) or (
            layer.sparsity > 0.4 and bool((threshold == 0).all())
        )
        assert is_met, layer


def test_calibrating_twice_is_calibrating_once(algorithm: str, llama: Any, batches: list[Any]) -> None:
    first = {name: threshold.clone() for name, threshold in calibrate(llama, batches, 0.5, algorithm).items()}
    assert_same(calibrate(llama, batches, 0.5, algorithm), first)


def test_equal_models_and_data_give_equal_thresholds(algorithm: str, make_model: Any, make_batches: Any) -> None:
    assert_same(
        calibrate(make_model(), make_batches(), 0.5, algorithm), calibrate(make_model(), make_batches(), 0.5, algorithm)
    )


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_types_are_kept_and_nothing_becomes_nan(
    algorithm: str, dtype: torch.dtype, architecture: str, make_model: Any, batches: list[Any]
) -> None:
    model = make_model(architecture, dtype=dtype)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    thresholds = calibrate(model, batches[:2], 0.5, algorithm)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items() if name in types} == types
    assert all(torch.isfinite(threshold).all() and (threshold >= 0).all() for threshold in thresholds.values())
    with torch.no_grad():
        logits = model(**batches[0]).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


def test_target_zero_is_the_identity(algorithm: str, llama: Any, batches: list[Any]) -> None:
    dense = copy.deepcopy(llama)
    thresholds = calibrate(llama, batches, 0, algorithm)
    assert len(thresholds) == 14
    assert all(threshold.item() == -torch.inf for threshold in thresholds.values())
    assert torch.equal(llama(**batches[0]).logits, dense(**batches[0]).logits)


def test_the_estimator_does_not_change_what_it_is_given(algorithm: str) -> None:
    x = torch.randn(2, 5, 8)
    before = x.clone()
    estimator = get_algorithm(algorithm).make_estimator((0.3, 0.6), None)
    estimator.update(x)
    masked = {target: estimator.mask_batch(x, target) for target in (0.3, 0.6)}
    assert torch.equal(x, before)
    assert all(m.shape == x.shape and m.dtype == x.dtype for m in masked.values())
    assert (masked[0.3] == 0).sum() < (masked[0.6] == 0).sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_estimator_refuses_what_is_not_finite(algorithm: str, bad: float) -> None:
    x = torch.randn(2, 5, 8)
    x[1, 2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        get_algorithm(algorithm).make_estimator((0.5,), None).update(x)


@pytest.mark.parametrize("name", ["magnitud", "", None, ["nncf"], 3], ids=repr)
def test_an_unknown_algorithm_is_refused_with_the_nearest(name: Any) -> None:
    with pytest.raises(ActsparseError, match="unknown algorithm .*; nearest: "):
        get_algorithm(name)
