"""The attribution allocation: what masks do, measured where they are."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from actsparse import TargetScope, measure_sparsity, sparsify_activations
from actsparse.algorithms import Attribution, LayerGroup, MeasurementCache
from actsparse.algorithms.attribution import MEASURED_SHARE, _first_shares, attribution, find_threshold
from actsparse.algorithms.groups import LayerSize, gather_groups
from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.evaluation.sparsity import count_zeros
from actsparse.scopes import group_sites
from actsparse.scopes.matching import Target
from actsparse.torch.insertion import named_sparsifiers, suspend_sparsifiers
from actsparse.torch.layers import find_layers, trace_graph
from actsparse.torch.measurements.torch_measurements import TorchMeasurements


class TwoSites:
    """Measurements of two equal sites of which one matters more."""

    def __init__(self, increases: dict[str, tuple[float, ...]]) -> None:
        x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
        self._sketch = MagnitudeSketch.of(x)
        self._increases = increases
        self.asked: list[tuple[dict[str, float], tuple[int, int]]] = []

    def sketches(self, _importance: Any) -> Any:
        return dict.fromkeys(self._increases, self._sketch)

    def attributions(self, sparsity: Any, _importance: Any, part: tuple[int, int]) -> dict[str, Attribution]:
        self.asked.append((dict(sparsity), part))
        return {name: Attribution(values, 1.0) for name, values in self._increases.items()}


PARTS = [LayerGroup("a", ("a",), 64, (1e4,), role="x"), LayerGroup("b", ("b",), 64, (1e4,), role="y")]


def share(increases: dict[str, tuple[float, ...]], target: float) -> dict[str, float]:
    return attribution([(target, PARTS)], TwoSites(increases), {})  # type: ignore[arg-type]


def test_what_matters_more_gives_less() -> None:
    model = TwoSites({"a": (0.9, 1.1, 1.0, 1.0), "b": (2.9, 3.1, 3.0, 3.0)})
    sparsity = attribution([(0.5, PARTS)], model, {})  # type: ignore[arg-type]
    assert sparsity["a"] > 0.55 > 0.45 > sparsity["b"]
    assert sum(sparsity.values()) / 2 == pytest.approx(0.5, abs=1e-3)
    # Measured once, below the target, on a part of the data.
    ((measured, part),) = model.asked
    assert part == (0, 2)
    assert measured == {"a": pytest.approx(0.5 * MEASURED_SHARE), "b": pytest.approx(0.5 * MEASURED_SHARE)}


def test_the_more_a_figure_is_noise_the_nearer_shares_are_to_each_other() -> None:
    steady, noisy = (
        share({"a": (1.0, 1.0), "b": (3.0 - noise, 3.0 + noise)}, 0.5) for noise in (0.0, 4.0)
    )  # fmt: skip
    assert steady["a"] > noisy["a"] > 0.5


def test_equal_parts_get_equal_shares_and_a_mask_that_seems_to_do_good_is_no_free_one() -> None:
    assert share({"a": (2.0, 2.1), "b": (2.0, 2.1)}, 0.3) == {
        "a": pytest.approx(0.3, abs=1e-3),
        "b": pytest.approx(0.3, abs=1e-3),
    }
    negative = share({"a": (-5.0, -5.0), "b": (5.0, 5.0)}, 0.5)
    assert 0.5 < negative["a"] < 0.95
    assert sum(negative.values()) / 2 == pytest.approx(0.5, abs=1e-3)


def test_a_unit_is_a_unit() -> None:
    small, large = (share({"a": (1.0 * f, 1.2 * f), "b": (2.0 * f, 2.2 * f)}, 0.5) for f in (1e-6, 1e6))
    assert small == pytest.approx(large, abs=1e-6)


def test_one_batch_is_enough_to_go_on() -> None:
    sparsity = share({"a": (1.0,), "b": (4.0,)}, 0.5)
    assert sparsity["a"] > 0.5 > sparsity["b"]


def measure(model: Any, batches: list[Any], sparsity: float) -> tuple[dict[str, Attribution], float]:
    """Attribute the divergence of a model masked everywhere; also give that of all tokens but each sequence's first."""
    layers = [layer for layer in find_layers(model, trace_graph(model, batches[0])) if "layers" in layer.name]
    sparsify_activations(model, batches, sparsity)
    masks = dict(named_sparsifiers(model))
    divergence = 0.0
    with torch.no_grad():
        for batch in batches:
            with suspend_sparsifiers(masks.values()):
                dense = model(**batch).logits.log_softmax(-1)
            masked = model(**batch).logits.log_softmax(-1)
            divergence += float(F.kl_div(masked[:, 1:], dense[:, 1:], reduction="sum", log_target=True))
    measurements = TorchMeasurements(model, batches, group_sites(layers), masks, cache=MeasurementCache())
    importance = dict.fromkeys((mask.site for mask in masks.values()), torch.ones(()))
    found = measurements.attributions(dict.fromkeys(masks, sparsity), importance, (0, 1))
    return dict(found), divergence


def test_a_small_divergence_is_shared_among_all_layers(make_model: Any, make_batches: Any) -> None:
    found, divergence = measure(make_model(), make_batches(4, batch_size=1, length=48), 0.1)
    assert len(found) == 14
    assert sum(sum(x.increases) for x in found.values()) == pytest.approx(2 * divergence, rel=0.35)
    assert all(len(x.increases) == 4 and x.energy > 0 for x in found.values())


def test_a_mask_that_nothing_depends_on_is_worth_nothing(make_model: Any, make_batches: Any) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    found, _ = measure(model, make_batches(2, batch_size=1, length=48), 0.3)
    assert found["model.layers.1.self_attn.o_proj"].increases == (0, 0)
    assert all(found[f"model.layers.1.self_attn.{x}_proj"].increases == (0, 0) for x in "qkv")
    assert sum(found["model.layers.1.mlp.down_proj"].increases) > 0


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
        ((_, parts),) = gather_groups(sites, dict.fromkeys(names, target), dict.fromkeys(names, LayerSize(8, 8, 1.0)))
        return {part.site: part.behind for part in parts if part.behind}

    names = [layer.name for layer in layers]
    assert behind(names) == {f"model.layers.{i}.mlp.down_proj": f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert behind([name for name in names if name != "model.layers.0.mlp.down_proj"]) == {
        "model.layers.1.mlp.down_proj": "model.layers.1.mlp.up_proj"
    }


@pytest.mark.parametrize("target", [0.01, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("sizes", [(1e4, 3e4), (3e4, 1e4), (1e4, 0.0), (0.0, 1e4)])
def test_the_first_shares_meet_what_is_measured_and_leave_something_everywhere(
    sizes: tuple[float, float], target: float
) -> None:
    rows, others = sizes
    parts = [LayerGroup("up", ("up",), 64, (rows,), is_of_rows=True)] if rows else []
    parts += [LayerGroup("down", ("down",), 64, (others,))] if others else []
    shares = {part.site: share for part, share in _first_shares(parts, target).items()}
    saved = rows * shares.get("up", 0.0) + others * shares.get("down", 0.0)
    assert saved == pytest.approx(MEASURED_SHARE * target * (rows + others))
    assert all(0 < share < 1 for share in shares.values())
    if rows and others:
        assert shares["up"] < shares["down"]


def test_the_size_of_the_next_entries_is_their_own_whatever_the_largest_are() -> None:
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    plain = find_threshold(MagnitudeSketch.of(x), 0.5)
    assert plain == pytest.approx(float(x.abs().median()), rel=0.01)
    # An attention sink's activations are thousands of times as large as all others.
    assert find_threshold(MagnitudeSketch.of(torch.cat([x, torch.full((5,), 1e6)])), 0.5) == pytest.approx(
        plain, rel=0.01
    )
    # Behind a ReLU half are zeros.
    assert 0 < find_threshold(MagnitudeSketch.of(x.relu()), 0.3) < plain
    assert find_threshold(MagnitudeSketch.of(torch.zeros(10)), 0.5) > 0
