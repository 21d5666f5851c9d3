"""Measured sparsity of OpenVINO models: that of torch models."""

import math
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch

from actsparse import ActsparseError, TargetScope, measure_sparsity, sparsify_activations
from actsparse.errors import DatasetError
from actsparse.openvino.graph_masks import insert_mask
from actsparse.openvino.linear import find_linears

# pyright cannot tell the overloads of its constructor apart.
make_graph: Any = ov.Model

TARGETS = {TargetScope(roles=("ffn.up", "ffn.gate")): 0.4, TargetScope(roles=("ffn.down",)): 0.6}


@pytest.mark.parametrize("targets", [0.5, TARGETS], ids=["all", "feed-forward"])
def test_the_report_is_that_of_the_torch_model(
    targets: Any, make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    expected = measure_sparsity(sparsify_activations(make_model(), batches, targets), batches).to_dict()
    model = sparsify_activations(make_openvino_model(), batches, targets)
    found = measure_sparsity(model, batches).to_dict()
    for key in ("sparsity", "weight_reads_skipped", "tokens", "by_role"):
        assert found[key] == pytest.approx(expected[key], abs=1e-3)
    assert {n: x["target"] for n, x in found["by_layer"].items()} == {
        n: x["target"] for n, x in expected["by_layer"].items()
    }
    assert {n: x["sparsity"] for n, x in found["by_layer"].items()} == pytest.approx(
        {n: x["sparsity"] for n, x in expected["by_layer"].items()}, abs=2e-3
    )


def test_measuring_leaves_the_model_as_it_was(openvino_llama: ov.Model, batches: list[Any], picture: Any) -> None:
    sparsify_activations(openvino_llama, batches, TARGETS)
    before = picture(openvino_llama)
    measure_sparsity(openvino_llama, batches)
    assert picture(openvino_llama) == before


def test_integer_weights_count_with_the_bytes_that_they_take(make_openvino_model: Any, batches: list[Any]) -> None:
    model = sparsify_activations(
        make_openvino_model("llama", "INT8_SYM"), batches, {TargetScope(names=["lm_head"]): 0.5}
    )
    report = measure_sparsity(model, batches)
    assert report.layers[0].weight_bytes == 32 * 64
    assert report.linear_bytes == sum(linear.in_features * linear.out_features for linear in find_linears(model))


def make_layer() -> ov.Model:
    x = ops.parameter([-1, 4], np.float32, name="x")
    layer = ops.matmul(x, ops.constant(np.eye(4, dtype=np.float32)), False, True)
    layer.set_friendly_name("layer")
    return make_graph([ops.result(layer)], [x], "layer")


def test_zeros_are_counted_over_all_batches_and_what_is_not_known_is_left_open() -> None:
    model = make_layer()
    insert_mask(list(find_linears(model)), 1.5)
    data = [torch.tensor([[1.0, -1.0, 2.0, 3.0]]), torch.tensor([[0.0, 4.0, -5.0, 1.5], [9.0, 9.0, 9.0, 9.0]])]
    report = measure_sparsity(model, data)
    (layer,) = report.layers
    assert (layer.name, layer.site, layer.roles, layer.target_sparsity) == ("layer", "layer", (), None)
    assert math.isclose(layer.sparsity, 4 / 12)
    assert report.weight_reads_skipped == report.sparsity == layer.sparsity


def test_a_model_without_masks_and_a_dataset_without_batches_are_refused() -> None:
    model = make_layer()
    with pytest.raises(ActsparseError, match="no activation sparsifiers"):
        measure_sparsity(model, [torch.ones(1, 4)])
    insert_mask(list(find_linears(model)), 1.5)
    with pytest.raises(DatasetError, match="empty"):
        measure_sparsity(model, [])
    with pytest.raises(DatasetError, match="batch 0"):
        measure_sparsity(model, [torch.ones(1, 5)])
