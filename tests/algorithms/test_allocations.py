"""Allocations: the budget is met by weight bytes, whatever is given to whom."""

from typing import Any

import pytest
import torch

from actsparse import ActsparseError, TargetScope, measure_sparsity, sparsify_activations
from actsparse.algorithms import ALLOCATIONS, LayerGroup
from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.torch.compression import compress_int8
from actsparse.torch.insertion import named_sparsifiers

GROUPS = [LayerGroup("small", ("a", "b"), 64, (4e3, 2e3)), LayerGroup("large", ("c",), 256, (5e4,))]


class Sketches:
    """Two sites whose scores are known."""

    def __init__(self, **scores: torch.Tensor) -> None:
        self._found = {site: MagnitudeSketch.of(values) for site, values in scores.items()}

    def sketches(self, _importance: Any) -> dict[str, MagnitudeSketch]:
        return self._found


def saved(sparsity: dict[str, float]) -> float:
    sizes = {name: size for part in GROUPS for name, size in zip(part.layers, part.layer_bytes, strict=True)}
    return sum(sizes[name] * share for name, share in sparsity.items()) / sum(sizes.values())


@pytest.fixture
def model() -> Any:
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(2, 20000, generator=generator).unbind()
    return Sketches(small=4 * small, large=large)


@pytest.mark.parametrize("target", [0.05, 0.3, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("name", ["uniform", "global"])
def test_the_budget_is_met_by_weight_bytes(name: str, target: float, model: Any) -> None:
    sparsity = ALLOCATIONS[name]([(target, GROUPS)], model, {})
    assert sparsity.keys() == {"a", "b", "c"}
    assert sparsity["a"] == sparsity["b"]
    assert saved(sparsity) == pytest.approx(target, abs=1e-3)


def test_global_takes_from_the_site_whose_bytes_are_cheapest(model: Any) -> None:
    sparsity = ALLOCATIONS["global"]([(0.5, GROUPS)], model, {})
    # Scores of `small` are four times as large, and its channels save fewer bytes each.
    assert sparsity["a"] < 0.25
    assert sparsity["c"] > 0.5


def test_global_is_uniform_where_all_sites_are_alike() -> None:
    x = torch.randn(10000, generator=torch.Generator().manual_seed(1))
    groups = [LayerGroup(site, (site,), 64, (1e3,)) for site in ("x", "y", "z")]
    sparsity = ALLOCATIONS["global"]([(0.37, groups)], Sketches(x=x, y=x, z=x), {})  # type: ignore[arg-type]
    assert list(sparsity.values()) == pytest.approx([0.37] * 3, abs=1e-3)


def test_global_grows_with_the_target_everywhere(model: Any) -> None:
    found = [ALLOCATIONS["global"]([(target, GROUPS)], model, {}) for target in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for lower, higher in zip(found, found[1:], strict=False):
        assert all(lower[name] <= higher[name] for name in lower)


@pytest.mark.parametrize(
    "algorithm",
    [
        "layer-fisher+global",
        "weight-norm+global",
        "measured+global",
        "teal",
        "cett",
        "magnitude+perturbation+rows",
        "fisher+attribution",
    ],
)
def test_a_scope_meets_its_target_together(algorithm: str, make_model: Any, make_batches: Any) -> None:
    batches = make_batches(2, batch_size=1, length=48)
    model = make_model()
    targets = {TargetScope(roles=("ffn.up", "ffn.gate", "ffn.down")): 0.6, TargetScope(roles=("attention.qkv",)): 0.3}
    sparsify_activations(model, batches, targets, algorithm=algorithm)
    report = measure_sparsity(model, batches)
    given = {"ffn": [], "attention": []}
    for layer in report.layers:
        given[layer.roles[0].split(".")[0]].append(layer)
    for kind, target in (("ffn", 0.6), ("attention", 0.3)):
        layers = given[kind]
        total = sum(layer.weight_bytes for layer in layers)
        assert sum(x.allocated_sparsity * x.weight_bytes for x in layers) / total == pytest.approx(target, abs=2e-3)
        assert sum(x.sparsity * x.weight_bytes for x in layers) / total == pytest.approx(target, abs=0.02)
    assert len({x.allocated_sparsity for x in report.layers}) > 2


@pytest.mark.parametrize("algorithm", ["layer-fisher+global", "teal"])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_none_and_all_are_what_they_say(algorithm: str, target: float, llama: Any, batches: list[Any]) -> None:
    sparsify_activations(llama, batches, target, algorithm=algorithm)
    assert {sparsifier.target_sparsity for _, sparsifier in named_sparsifiers(llama)} == {target}
    assert {layer.sparsity for layer in measure_sparsity(llama, batches).layers} == {target}


def test_greedy_prefers_what_moves_the_output_least(make_model: Any, batches: list[Any]) -> None:
    model = make_model()
    with torch.no_grad():
        # Nothing comes out of the first block's attention: masking it costs nothing.
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    sparsify_activations(model, batches, 0.3, algorithm="teal")
    targets = {name: sparsifier.allocated_sparsity for name, sparsifier in named_sparsifiers(model)}
    first = {name.rpartition(".")[2]: s for name, s in targets.items() if ".layers.0." in name}
    assert all(first[name] > 0.2 for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert all(first[name] == 0 for name in ("up_proj", "gate_proj", "down_proj"))


def test_compressed_weights_keep_their_gradients_and_refuse_blocks(make_model: Any, batches: list[Any]) -> None:
    dense, compressed = make_model(), compress_int8(make_model(), "asym", batches[0])
    for model in (dense, compressed):
        sparsify_activations(model, batches, 0.5, algorithm="fisher-blend+global")
    for (name, left), (_, right) in zip(named_sparsifiers(dense), named_sparsifiers(compressed), strict=True):
        assert torch.allclose(left.threshold, right.threshold, rtol=0.3), name
    before = {name: sparsifier.threshold for name, sparsifier in named_sparsifiers(compressed)}
    with pytest.raises(ActsparseError, match="calibrate first, then compress"):
        sparsify_activations(compressed, batches, 0.5, algorithm="teal")
    assert all(torch.equal(s.threshold, before[name]) for name, s in named_sparsifiers(compressed))


def test_weight_norms_are_those_of_the_decompressed_weights(make_model: Any, batches: list[Any]) -> None:
    dense, compressed = make_model(), compress_int8(make_model(), "asym", batches[0])
    for model in (dense, compressed):
        sparsify_activations(model, batches, 0.5, algorithm="wina")
    for (name, left), (_, right) in zip(named_sparsifiers(dense), named_sparsifiers(compressed), strict=True):
        assert left.threshold.shape == right.threshold.shape != ()
        assert torch.allclose(left.threshold, right.threshold, rtol=0.1), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snip+globl", "unknown allocation 'globl'; nearest: global"),
        ("snop+global", "unknown score 'snop'; nearest: snip"),
        ("fisher+nncf-ema", "goes with the score magnitude, not fisher"),
        ("a+b+c", "unknown algorithm"),
    ],
)
def test_a_pair_that_cannot_be_is_refused_before_anything_is_run(name: str, message: str, llama: Any) -> None:
    with pytest.raises(ActsparseError, match=message):
        sparsify_activations(llama, iter(()), 0.5, algorithm=name)


class OneBlock:
    """A block whose output moves by the sum of weighted squares of its layers' sparsities."""

    layers = ("a", "b", "c")

    def __init__(self) -> None:
        self.runs = 0

    def error(self, sparsity: dict[str, float]) -> float:
        self.runs += 1
        return sum(weight * sparsity[name] ** 2 for name, weight in zip(self.layers, (1.0, 5.0, 2.0), strict=True))


class Greedy:
    """Measurements of that block, which remember."""

    def __init__(self) -> None:
        self.block = OneBlock()
        self._found: dict[Any, Any] = {}

    def blocks(self, _layers: Any, _importance: Any) -> list[OneBlock]:
        return [self.block]

    def get_or_measure(self, what: Any, measure: Any) -> Any:
        if what not in self._found:
            self._found[what] = measure()
        return self._found[what]


@pytest.mark.parametrize("targets", [(0.3, 0.5, 0.45, 0.1, 0.7), (0.7, 0.3), (1.0, 0.99)])
def test_greedy_goes_each_way_once(targets: tuple[float, ...]) -> None:
    remembering = Greedy()
    for target in targets:
        fresh = Greedy()
        expected = ALLOCATIONS["greedy"]([(target, GROUPS)], fresh, {})  # type: ignore[arg-type]
        assert saved(expected) == pytest.approx(target, abs=1e-9)
        assert ALLOCATIONS["greedy"]([(target, GROUPS)], remembering, {}) == expected  # type: ignore[arg-type]
    longest = Greedy()
    ALLOCATIONS["greedy"]([(max(targets), GROUPS)], longest, {})  # type: ignore[arg-type]
    assert remembering.block.runs == longest.block.runs
