"""Blocks that run on their own."""

from typing import Any

import pytest
import torch

from actsparse import sparsify_activations
from actsparse.scopes import group_sites
from actsparse.torch.insertion import named_sparsifiers
from actsparse.torch.layers import find_layers, trace_graph
from actsparse.torch.measurements.torch_measurements import TorchMeasurements


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_a_blocks_error_is_beside_its_dense_output(first: float, make_model: Any, make_batches: Any) -> None:
    batches = make_batches(2, batch_size=1, length=40)
    model = sparsify_activations(make_model(), batches, 0.5)
    layers = [layer for layer in find_layers(model, trace_graph(model, batches[0])) if "layers" in layer.name]
    masks = dict(named_sparsifiers(model))
    measurements = TorchMeasurements(model, batches, group_sites(layers), masks)
    importance = dict.fromkeys((mask.site for mask in masks.values()), torch.ones(()))
    blocks = list(measurements.blocks(list(masks), importance))
    assert [len(block.layers) for block in blocks] == [7, 7]
    for block in blocks:
        # Whatever is asked first, the reference is the dense block.
        block.error(dict.fromkeys(block.layers, first))
        assert block.error(dict.fromkeys(block.layers, 0.0)) == pytest.approx(0, abs=1e-6)
        errors = [block.error(dict.fromkeys(block.layers, sparsity)) for sparsity in (0.2, 0.5, 0.8)]
        assert 0 < errors[0] < errors[1] < errors[2]
