"""The output head as one operation: its numbers, its one copy of the weights, and what others take it for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino.passes import Matcher, WrapType

from actsparse import TargetScope, sparsify_activations
from actsparse.openvino import accelerate, count_masks, extension_path
from actsparse.openvino.layers import find_openvino_layers
from actsparse.openvino.linear import find_head, find_linears
from actsparse.openvino.runner import EXACT, Runner

pytestmark = pytest.mark.slow

HEAD = TargetScope(roles=("head",))


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (2, 12))


def logits(model: ov.Model, tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([Runner(model, EXACT).run({"input_ids": row[None]})["logits"] for row in tokens])


def operations(model: ov.Model) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops() if node.get_type_name().startswith("Sparse")]


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT8_SYM", "INT4_ASYM"])
def test_the_head_alone_moves_and_gives_the_same_logits(
    make_openvino_model: Callable[..., ov.Model],
    make_batches: Callable[..., Any],
    tokens: np.ndarray,
    mode: str,
    architecture: str,
    is_masked: bool,
) -> None:
    model = make_openvino_model(architecture, mode)
    if is_masked:
        sparsify_activations(model, make_batches(), {HEAD: 0.5})
    portable = logits(model, tokens)
    report = accelerate(model, exact=True)
    assert [(site.operation, len(site.layers), site.is_masked) for site in report.accelerated] == [
        ("SparseHead", 1, is_masked)
    ]
    assert len(report.masked) == is_masked
    assert operations(model) == ["SparseHead"]
    assert count_masks(model) == 0
    np.testing.assert_allclose(logits(model, tokens), portable, atol=1e-4 * np.abs(portable).max())


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_the_role_is_that_of_the_layer_that_moves(
    make_openvino_model: Callable[..., ov.Model], architecture: str
) -> None:
    model = make_openvino_model(architecture, "INT8_ASYM")
    head = find_head(model)
    assert head
    roles = {layer.nodes: layer.roles for layer in find_openvino_layers(model).all}
    assert roles[(head.name,)] == ("head",)
    assert sum("head" in given for given in roles.values()) == 1


def test_one_number_for_a_model_leaves_the_head_out(
    make_openvino_model: Callable[..., ov.Model], make_batches: Callable[..., Any]
) -> None:
    model = make_openvino_model("llama", "INT8_ASYM")
    sparsify_activations(model, make_batches(), 0.5)
    assert accelerate(model).accelerated[-1].is_masked is False


def test_every_layer_can_move_or_none(make_openvino_model: Callable[..., ov.Model], tokens: np.ndarray) -> None:
    model = make_openvino_model("llama", "INT8_ASYM")
    expected = logits(model, tokens)
    assert not accelerate(model, dense="none").accelerated
    np.testing.assert_array_equal(logits(model, tokens), expected)
    layers = {linear.module_name for linear in find_linears(model)}
    report = accelerate(model, exact=True, dense="all")
    assert {name for site in report.accelerated for name in site.layers} == layers
    assert not report.masked
    assert not list(find_linears(model))
    np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-4 * np.abs(expected).max())


def test_weights_that_are_not_bytes_stay(make_openvino_model: Callable[..., ov.Model]) -> None:
    assert not accelerate(make_openvino_model("llama"), dense="all").accelerated


def test_a_saved_model_has_the_embedding_once(
    make_openvino_model: Callable[..., ov.Model], tokens: np.ndarray, tmp_path: Path
) -> None:
    model = make_openvino_model("gpt2", "INT8_ASYM")
    paths = tmp_path / "dense.xml", tmp_path / "accelerated.xml"
    ov.save_model(model, paths[0], compress_to_fp16=False)
    head = find_head(model)
    assert head
    accelerate(model)
    assert len(head.constant.output(0).get_target_inputs()) == 2, "the embedding is not the head's"
    ov.save_model(model, paths[1], compress_to_fp16=False)
    sizes = [path.with_suffix(".bin").stat().st_size for path in paths]
    assert sizes[1] - sizes[0] < head.weight_bytes / 2
    core = ov.Core()
    core.add_extension(str(extension_path()))
    np.testing.assert_array_equal(logits(core.read_model(paths[1]), tokens), logits(model, tokens))


def test_openvino_genai_finds_a_multiplication_before_the_logits(
    make_openvino_model: Callable[..., ov.Model], tokens: np.ndarray
) -> None:
    # It puts a Slice or Gather before the MatMul that a result reads, so that a prompt gives the last logits alone.
    model = make_openvino_model("llama", "INT8_ASYM")
    accelerate(model, exact=True)
    expected = logits(model, tokens)
    head = model.get_results()[0].input_value(0).get_node()
    assert head.get_type_name() == "SparseHead"
    assert Matcher(WrapType("opset13.MatMul"), "multiplication").match(head)
    begin, end, step, axis = (ov.opset13.constant([number], np.int64) for number in (-1, -2, -1, 1))
    head.input(0).replace_source_output(ov.opset13.slice(head.input_value(0), begin, end, step, axis).output(0))
    model.validate_nodes_and_infer_types()
    np.testing.assert_allclose(logits(model, tokens), expected[:, -1:], atol=1e-5 * np.abs(expected).max())
