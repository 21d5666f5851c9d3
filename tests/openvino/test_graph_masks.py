"""Masks are found, and are what was put in."""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from actsparse.openvino.graph_masks import count_masks, find_masks, insert_mask, remove_masks
from actsparse.openvino.linear import find_linears

# pyright cannot tell the overloads of its constructor apart.
make_graph: Any = ov.Model


def make_model(kind: Any = np.float32) -> ov.Model:
    x = ops.parameter([-1, -1, 3], kind, name="x")
    node = ops.matmul(x, ops.constant(np.eye(3), dtype=kind), False, True)
    node.set_friendly_name("layer")
    return make_graph([ops.result(ops.convert(node, "f32"))], [x], "model")


def run(model: ov.Model, x: Any, kind: Any = np.float32) -> Any:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([np.array(x, kind)])[0].tolist()


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("threshold", [1.0, [2.0, 0.0, 0.5]], ids=["one", "for each channel"])
def test_entries_up_to_the_threshold_become_zero(kind: Any, threshold: Any) -> None:
    model = make_model(kind)
    insert_mask(list(find_linears(model)), np.array(threshold))
    x = [[[1.0, -1.0, 1.5], [-2.0, 0.0, 0.5]]]
    expected = np.where(np.abs(x) <= np.array(threshold), 0, x).tolist()
    assert run(model, x, kind) == expected
    (mask,) = find_masks(model)
    assert mask.threshold.tolist() == threshold
    assert ([linear.name for linear in mask.linears], mask.tokens) == (["layer"], "all")


def test_a_decode_mask_lets_several_tokens_pass() -> None:
    model = make_model()
    insert_mask(list(find_linears(model)), 1.0, "decode")
    assert run(model, [[[1.0, -1.0, 1.5], [-2.0, 0.0, 0.5]]]) == [[[1.0, -1.0, 1.5], [-2.0, 0.0, 0.5]]]
    assert run(model, [[[1.0, -1.0, 1.5]], [[0.5, 3.0, 1.0]]]) == [[[0.0, 0.0, 1.5]], [[0.0, 3.0, 0.0]]]
    (mask,) = find_masks(model)
    assert (mask.threshold.tolist(), mask.tokens) == (1.0, "decode")


@pytest.mark.parametrize("tokens", ["all", "decode"])
def test_removed_masks_are_gone(tokens: str) -> None:
    model = make_model()
    insert_mask(list(find_linears(model)), 1.0, tokens)
    assert count_masks(model) == 1
    assert remove_masks(model) == 1
    assert (count_masks(model), remove_masks(model)) == (0, 0)
    assert run(model, [[[1.0, -1.0, 1.5]]]) == [[[1.0, -1.0, 1.5]]]


def test_a_threshold_outlives_the_model() -> None:
    model = make_model()
    insert_mask(list(find_linears(model)), 1.0)
    (mask,) = find_masks(model)
    threshold = mask.threshold
    del model, mask
    assert threshold.item() == 1.0


def test_what_only_looks_like_a_mask_is_none() -> None:
    x = ops.parameter([-1, 3], np.float32, name="x")
    zero, one = ops.constant(np.float32(0)), ops.constant(np.float32(1))
    of_another = ops.select(ops.less_equal(ops.absolute(ops.relu(x)), one), zero, x)
    not_zero = ops.select(ops.less_equal(ops.absolute(x), one), one, x)
    by_length = ops.select(ops.less_equal(ops.absolute(x), ops.select(ops.less(zero, one), one, zero)), zero, x)
    layers = [ops.matmul(select, ops.constant(np.eye(3, dtype=np.float32)), False, True)
              for select in (of_another, not_zero, by_length)]  # fmt: skip
    assert not find_masks(make_graph([ops.result(layer) for layer in layers], [x], "model"))
