"""OpenVINO layers have the names, sites and roles of the torch modules that they come from."""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from actsparse.errors import ActsparseError
from actsparse.openvino.layers import find_openvino_layers, named_calls
from actsparse.scopes import group_sites
from actsparse.torch.layers import find_layers, in_features, out_features, trace_graph

# pyright cannot tell the overloads of its constructor apart.
make_graph: Any = ov.Model

ARCHITECTURES = ("llama", "qwen3", "phi3", "mistral", "gpt2", "gpt_neox", "opt")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_sizes_roles_and_sites_are_those_of_torch(
    architecture: str, make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    torch_model, model = make_model(architecture), make_openvino_model(architecture)
    expected = find_layers(torch_model, trace_graph(torch_model, batches[0]))
    layers = find_openvino_layers(model).all
    assert {layer.name: layer.roles for layer in layers} == {layer.name: layer.roles for layer in expected}
    # Layers behind equal normalisations (GPT-NeoX's two start equal) may come to share what OpenVINO computes once.
    found = [{layer.name for layer in site.layers} for site in group_sites(layers)]
    assert all(any({x.name for x in site.layers} <= names for names in found) for site in group_sites(expected))
    assert len(found) == len(group_sites(expected)) - (2 if architecture == "gpt_neox" else 0)
    for name, calls in named_calls(model).items():
        module = torch_model.get_submodule(name)
        assert (calls[0].in_features, calls[0].out_features) == (in_features(module), out_features(module))


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT8_SYM", "INT4_ASYM", "INT4_SYM"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compression_changes_neither_names_nor_roles_nor_sizes(
    architecture: str, mode: str, make_openvino_model: Any
) -> None:
    expected = find_openvino_layers(make_openvino_model(architecture)).all
    compressed = make_openvino_model(architecture, mode)
    layers = find_openvino_layers(compressed).all
    assert {layer.name: layer.roles for layer in layers} == {layer.name: layer.roles for layer in expected}
    kinds = {calls[0].constant.get_element_type().bitwidth for calls in named_calls(compressed).values()}
    assert min(kinds) == (8 if "INT8" in mode else 4)


# ---- Names that carry less


def multiply(x: Any, name: str, weight: str, *, size: int = 4) -> ov.Node:
    generator = np.random.default_rng(len(name))
    constant = ops.constant(generator.normal(size=(size, size)).astype(np.float32))
    constant.set_friendly_name(weight)
    node = ops.matmul(x, constant, False, True)
    node.set_friendly_name(name)
    return node


def make_network(names: list[tuple[str, str]]) -> ov.Model:
    """Make one layer after another, with a function in between that makes them one feed-forward network each two."""
    x = ops.parameter([-1, -1, 4], np.float32, name="x")
    y: Any = x
    for name, weight in names:
        y = ops.tanh(multiply(y, name, weight))
    return make_graph([ops.result(y)], [x], "network")


def block_names(model: ov.Model) -> list[str]:
    return [layer.name for layer in find_openvino_layers(model).of_blocks]


def test_layers_without_module_names_are_named_after_their_nodes() -> None:
    model = make_network([("matmul_a", "Constant_1"), ("matmul_b", "Constant_2"), ("matmul_c", "Constant_3")])
    assert list(named_calls(model)) == ["matmul_a", "matmul_b", "matmul_c"]


def test_the_last_layer_of_a_model_without_numbers_in_names_is_its_head() -> None:
    model = make_network([("matmul_a", "Constant_1"), ("matmul_b", "Constant_2"), ("matmul_c", "Constant_3")])
    assert block_names(model) == ["matmul_a", "matmul_b"]


def test_layers_that_add_up_to_the_result_are_no_head() -> None:
    x = ops.parameter([-1, 4], np.float32, name="x")
    y = ops.add(multiply(x, "matmul_a", "Constant_1"), multiply(ops.relu(x), "matmul_bb", "Constant_2"))
    assert block_names(make_graph([ops.result(y)], [x], "sum")) == ["matmul_a", "matmul_bb"]


def test_different_weights_of_one_module_are_different_layers() -> None:
    names = [("__module.experts/aten::linear/MatMul", "c1"), ("__module.experts/aten::linear/MatMul_1", "c2")]
    assert list(named_calls(make_network(names))) == [name for name, _ in names]


def test_a_weight_tells_more_than_a_node_named_after_its_parent() -> None:
    names = [(f"__module.mlp/aten::linear/MatMul_{i}", f"self.mlp.experts.{i}.up.weight") for i in (0, 1)]
    assert list(named_calls(make_network(names))) == ["mlp.experts.0.up", "mlp.experts.1.up"]


def test_a_layer_that_is_called_twice_is_one_layer() -> None:
    x = ops.parameter([-1, 4], np.float32, name="x")
    weight = ops.constant(np.eye(4, dtype=np.float32))
    weight.set_friendly_name("self.layer.weight")
    calls = [ops.matmul(value, weight, False, True) for value in (x, ops.tanh(x))]
    for i, call in enumerate(calls):
        call.set_friendly_name(f"__module.layer/aten::linear/MatMul_{i}")
    model = make_graph([ops.result(call) for call in calls], [x], "twice")
    assert {name: len(group) for name, group in named_calls(model).items()} == {"layer": 2}


def test_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(ActsparseError, match="one name, same"):
        named_calls(make_network([("same", "c1"), ("same", "c2")]))


def test_a_product_of_columns_is_no_layer_that_can_be_masked() -> None:
    x = ops.parameter([4, 3], np.float32, name="x")
    node = ops.matmul(x, ops.constant(np.eye(4, dtype=np.float32)), True, False)
    assert not named_calls(make_graph([ops.result(node)], [x], "columns"))
