"""The CETT allocation: the same relative output error everywhere."""

from typing import Any

import numpy as np
import pytest
import torch

from actsparse import sparsify_activations
from actsparse.algorithms import ALLOCATIONS, LayerGroup, MeasurementCache
from actsparse.mask import mask_small
from actsparse.scopes import group_sites
from actsparse.torch.insertion import named_sparsifiers, suspend_sparsifiers
from actsparse.torch.layers import find_layers, trace_graph
from actsparse.torch.measurements.torch_measurements import TorchMeasurements

SPARSITIES = (0.0, 0.3, 0.6, 0.9, 1.0)


def measure(model: Any, batches: list[Any], gates: dict[str, str] | None = None) -> TorchMeasurements:
    layers = [layer for layer in find_layers(model, trace_graph(model, batches[0])) if "layers" in layer.name]
    masks = dict(named_sparsifiers(model))
    return TorchMeasurements(model, batches, group_sites(layers, gates), masks, cache=MeasurementCache())


@pytest.mark.parametrize("site", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
def test_errors_are_those_of_the_definition(site: str, make_model: Any, make_batches: Any) -> None:
    batches = make_batches(2, batch_size=1, length=40)
    model = sparsify_activations(make_model(), batches, 0.5)
    measurements = measure(model, batches)
    masks = dict(named_sparsifiers(model))
    importance = dict.fromkeys((mask.site for mask in masks.values()), torch.ones(()))
    found = measurements.output_errors(importance, SPARSITIES)[site]
    assert found[0] == pytest.approx(0, abs=1e-3)
    assert found[-1] == pytest.approx(1, abs=1e-6)
    assert found == sorted(found)

    inputs: list[torch.Tensor] = []
    handle = masks[site].register_forward_hook(lambda _m, args, _o: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad(), suspend_sparsifiers(masks.values()):
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat(inputs)
    weight = torch.cat([model.get_submodule(name).weight.detach() for name, mask in masks.items() if mask.site == site])
    for sparsity, error in zip(SPARSITIES[1:-1], found[1:-1], strict=True):
        left_out = x - mask_small(x, x.abs().flatten().quantile(sparsity))
        expected = ((left_out @ weight.T).norm(dim=1) / (x @ weight.T).norm(dim=1)).mean()
        assert error == pytest.approx(float(expected), rel=0.01)


def test_compressed_layers_and_biases_are_measured_alike(make_model: Any, compress: Any, make_batches: Any) -> None:
    batches = make_batches(2, batch_size=1, length=40)
    for architecture in ("llama", "gpt2"):
        dense = sparsify_activations(make_model(architecture), batches, 0.5, algorithm="cett")
        packed = sparsify_activations(compress(make_model(architecture)), batches, 0.5, algorithm="cett")
        for (name, left), (_, right) in zip(named_sparsifiers(dense), named_sparsifiers(packed), strict=True):
            assert left.allocated_sparsity == pytest.approx(right.allocated_sparsity, abs=0.03), name


class Curves:
    """Two sites whose errors are known."""

    def output_errors(self, _importance: Any, sparsities: Any) -> dict[str, list[float]]:
        s = np.array(sparsities)
        return {"a": list(s), "b": list(s**2)}


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_both_sites_make_the_same_error(target: float) -> None:
    parts = [LayerGroup("a", ("a",), 64, (1e4,)), LayerGroup("b", ("b",), 64, (3e4,))]
    found = ALLOCATIONS["cett"]([(target, parts)], Curves(), {})  # type: ignore[arg-type]
    assert (found["a"] + 3 * found["b"]) / 4 == pytest.approx(target, abs=1e-6)
    assert found["a"] == pytest.approx(found["b"] ** 2, abs=0.01)
