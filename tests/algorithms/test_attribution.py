"""The attribution allocation: what masks do, measured where they are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from actsparse import TargetScope, measure_sparsity, sparsify_activations
from actsparse.algorithms import Attribution, Known, Part
from actsparse.algorithms.attribution import _first_shares, attribution
from actsparse.algorithms.parts import LayerSize, gather_parts
from actsparse.evaluation.sparsity import count_zeros
from actsparse.insertion import named_sparsifiers, suspend_sparsifiers
from actsparse.measurements import TorchMeasurements
from actsparse.scopes import group_sites
from actsparse.scopes.graph import trace_graph
from actsparse.scopes.layers import find_layers
from actsparse.scopes.matching import Target
from actsparse.statistics import MagnitudeSketch


class TwoSites:
    """Measurements of two equal sites of which one matters more."""

    def __init__(self, increase: dict[str, float]) -> None:
        x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
        self._sketch = MagnitudeSketch.of(x)
        self._increase = increase
        self.asked: list[tuple[dict[str, float], tuple[int, int]]] = []

    def sketches(self, _importance: Any) -> Any:
        return dict.fromkeys("ab", self._sketch)

    def attributions(self, sparsity: Any, _importance: Any, part: tuple[int, int]) -> dict[str, Attribution]:
        self.asked.append((dict(sparsity), part))
        return {name: Attribution(value, abs(value) + 1.0, 1.0) for name, value in self._increase.items()}


PARTS = [Part("a", ("a",), 64, (1e4,)), Part("b", ("b",), 64, (1e4,))]


def test_what_matters_more_gives_less() -> None:
    model = TwoSites({"a": 1.0, "b": 9.0})
    sparsity = attribution([(0.5, PARTS)], model, {})  # type: ignore[arg-type]
    assert sparsity["a"] > 0.6 > 0.4 > sparsity["b"]
    assert sum(sparsity.values()) / 2 == pytest.approx(0.5, abs=1e-3)
    # One threshold, for scores that the square root of the increase makes comparable.
    quantiles = [model.sketches(None)[name].quantile(sparsity[name]) for name in "ab"]
    assert quantiles[0] == pytest.approx(3 * quantiles[1], rel=0.01)
    # Each round on data of its own.
    assert [part for _, part in model.asked] == [(0, 2), (1, 2)]
    assert model.asked[0][0] == {"a": 0.5, "b": 0.5}


def test_equal_parts_get_equal_shares_and_noise_does_not_count_as_nothing() -> None:
    sparsity = attribution([(0.3, PARTS)], TwoSites({"a": 2.0, "b": 2.0}), {})  # type: ignore[arg-type]
    assert sparsity == {"a": pytest.approx(0.3, abs=1e-3), "b": pytest.approx(0.3, abs=1e-3)}
    negative = attribution([(0.5, PARTS)], TwoSites({"a": -5.0, "b": 5.0}), {})  # type: ignore[arg-type]
    assert 0.5 < negative["a"] < 1.0
    assert sum(negative.values()) / 2 == pytest.approx(0.5, abs=1e-3)


def measure(model: Any, batches: list[Any], sparsity: float) -> tuple[dict[str, Attribution], float]:
    """Attribute the divergence of a model masked everywhere; also give the divergence itself."""
    layers = [layer for layer in find_layers(model, trace_graph(model, batches[0])) if "layers" in layer.name]
    sparsify_activations(model, batches, sparsity)
    masks = dict(named_sparsifiers(model))
    divergence = 0.0
    with torch.no_grad():
        for batch in batches:
            with suspend_sparsifiers(masks.values()):
                dense = model(**batch).logits.log_softmax(-1)
            masked = model(**batch).logits.log_softmax(-1)
            divergence += float(F.kl_div(masked, dense, reduction="sum", log_target=True))
    measurements = TorchMeasurements(model, batches, group_sites(layers), masks, known=Known())
    importance = dict.fromkeys((mask.site for mask in masks.values()), torch.ones(()))
    found = measurements.attributions(dict.fromkeys(masks, sparsity), importance, (0, 1))
    return dict(found), divergence


def test_a_small_divergence_is_shared_among_all_layers(make_model: Any, make_batches: Any) -> None:
    found, divergence = measure(make_model(), make_batches(4, batch_size=1, length=48), 0.1)
    assert len(found) == 14
    assert sum(x.increase for x in found.values()) == pytest.approx(2 * divergence, rel=0.35)
    assert all(x.noise >= abs(x.increase) and x.energy > 0 for x in found.values())


def test_a_mask_that_nothing_depends_on_is_worth_nothing(make_model: Any, make_batches: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    found, _ = measure(model, make_batches(2, batch_size=1, length=48), 0.3)
    assert found["model.layers.1.self_attn.o_proj"].increase == 0
    assert all(found[f"model.layers.1.self_attn.{x}_proj"].increase == 0 for x in "qkv")
    assert found["model.layers.1.mlp.down_proj"].increase > 0


def test_nothing_of_the_model_changes(make_model: Any, batches: list[Any]) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsify_activations(model, batches, 0.5, algorithm="auto")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "gpt2", "bert"])
def test_the_target_is_met_by_weight_bytes(
    architecture: str, target: float, make_model: Any, make_batches: Any
) -> None:
    batches = make_batches(2, batch_size=1, length=48)
    model = sparsify_activations(make_model(architecture), batches, target, algorithm="auto")
    with count_zeros(model) as counter, torch.no_grad():
        for batch in batches:
            model(**batch)
    assert counter.report().sparsity == pytest.approx(target, abs=0.03)


def test_several_scopes_keep_their_own_budgets(make_model: Any, make_batches: Any) -> None:
    batches = make_batches(2, batch_size=1, length=48)
    targets = {TargetScope(roles=("ffn.up", "ffn.gate", "ffn.down")): 0.6, TargetScope(roles=("attention.qkv",)): 0.2}
    model = sparsify_activations(make_model(), batches, targets, algorithm="auto")
    by_scope: dict[str, list[Any]] = {}
    for layer in measure_sparsity(model, batches).layers:
        by_scope.setdefault(layer.roles[0].split(".")[0], []).append(layer)
    for kind, target in (("ffn", 0.6), ("attention", 0.2)):
        total = sum(x.weight_bytes for x in by_scope[kind])
        assert sum(x.sparsity * x.weight_bytes for x in by_scope[kind]) / total == pytest.approx(target, abs=0.02)


def test_a_down_projection_stands_behind_its_own_rows_only(llama: Any, batches: list[Any]) -> None:
    layers = [layer for layer in find_layers(llama, trace_graph(llama, batches[0])) if "mlp" in layer.name]
    gates = {f"model.layers.{i}.mlp.up_proj": f"model.layers.{i}.mlp.act_fn" for i in range(2)}

    def behind(names: list[str]) -> dict[str, str]:
        sites = group_sites([layer for layer in layers if layer.name in names], gates)
        target = Target(0.5, "all")  # type: ignore[arg-type]
        ((_, parts),) = gather_parts(sites, dict.fromkeys(names, target), dict.fromkeys(names, LayerSize(8, 8, 1.0)))
        return {part.site: part.behind for part in parts if part.behind}

    names = [layer.name for layer in layers]
    assert behind(names) == {f"model.layers.{i}.mlp.down_proj": f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert behind([name for name in names if name != "model.layers.0.mlp.down_proj"]) == {
        "model.layers.1.mlp.down_proj": "model.layers.1.mlp.up_proj"
    }


@pytest.mark.parametrize("target", [0.01, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("sizes", [(1e4, 3e4), (3e4, 1e4), (1e4, 0.0), (0.0, 1e4)])
def test_the_first_shares_meet_the_target_and_leave_something_everywhere(
    sizes: tuple[float, float], target: float
) -> None:
    rows, others = sizes
    parts = [Part("up", ("up",), 64, (rows,), is_of_rows=True)] if rows else []
    parts += [Part("down", ("down",), 64, (others,))] if others else []
    shares = _first_shares(parts, target)
    saved = rows * shares.get("up", 0.0) + others * shares.get("down", 0.0)
    assert saved == pytest.approx(target * (rows + others))
    assert all(0 < share < 1 for share in shares.values())
    if rows and others:
        assert shares["up"] < shares["down"]
