"""The Linear layers of an OpenVINO model as scopes see them: named after torch modules, with roles."""

import re
from collections.abc import Iterable

import openvino as ov
from nncf.common.graph.graph import NNCFGraph
from nncf.openvino.graph.nncf_graph_builder import GraphConverter

from actsparse.errors import ActsparseError
from actsparse.openvino.linear import Linear, find_factor, find_linears, module_of_node
from actsparse.scopes.graph import CONSTANT, INPUT, SHAPE, Flow, Tensor
from actsparse.scopes.layers import Layer, Layers, LayerSize
from actsparse.scopes.roles import find_roles
from actsparse.scopes.zeros import NO_ACTIVATION, find_activations

# What torch calls the operations that roles are told by.
OPERATIONS = {
    "Clamp": "hardtanh",
    "Constant": CONSTANT,
    "Elu": "elu",
    "Erf": "erf",
    "Gelu": "gelu",
    "Greater": "gt",
    "GreaterEqual": "ge",
    "HSigmoid": "hardsigmoid",
    "HSwish": "hardswish",
    "HardSigmoid": "hardsigmoid",
    "MatMul": "matmul",
    "Mish": "mish",
    "Multiply": "mul",
    "PRelu": "prelu",
    "Parameter": INPUT,
    "Power": "pow",
    "Relu": "relu",
    "ScaledDotProductAttention": "scaled_dot_product_attention",
    "Select": "where",
    "Selu": "selu",
    "ShapeOf": SHAPE,
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
    "SoftPlus": "softplus",
    "Swish": "silu",
    "Tanh": "tanh",
}
# Operations that hand on the same values, so that two layers behind them still read one tensor.
SAME_VALUES = ("Reshape", "Convert", "Squeeze", "Unsqueeze")


def named_calls(model: ov.Model) -> dict[str, tuple[Linear, ...]]:
    """
    Name the Linear layers of a model.

    :return: The calls of each layer, by module name, or by node name where no module is known or several layers would
        have the name of one; in topological order.
    :raises ActsparseError: If two of the nodes have one name.
    """
    linears = [linear for linear in find_linears(model) if not linear.is_input_transposed]
    weights: dict[str, set[str]] = {}
    nodes: set[str] = set()
    for linear in linears:
        weights.setdefault(linear.module_name, set()).add(linear.constant.get_friendly_name())
        if linear.name in nodes:
            msg = f"two layers of the OpenVINO model have one name, {linear.name}"
            raise ActsparseError(msg)
        nodes.add(linear.name)
    calls: dict[str, list[Linear]] = {}
    for linear in linears:
        name = linear.module_name
        calls.setdefault(name if len(weights[name]) == 1 else linear.name, []).append(linear)
    return {name: tuple(group) for name, group in calls.items()}


def find_openvino_layers(model: ov.Model) -> Layers:
    """
    Find the Linear layers of a model, with their nodes, inputs and roles.

    :return: The layers in topological order, and the model's NNCF graph, whose node names are the model's.
    """
    graph = GraphConverter.create_nncf_graph(model)
    flow = Flow(graph, OPERATIONS)
    calls = named_calls(model)
    ids = {node.node_name: i for i, node in flow.nodes.items()}
    linears = {ids[call.name]: name for name, group in calls.items() for call in group}
    sizes = {name: (group[0].in_features, group[0].out_features) for name, group in calls.items()}
    sources = {
        name: tuple(Tensor(ids[c.source.get_node().get_friendly_name()], c.source.get_index()) for c in group)
        for name, group in calls.items()
    }
    shared = {name: tuple(flow.origin(tensor, SAME_VALUES) for tensor in tensors) for name, tensors in sources.items()}
    roles = find_roles(flow, linears, sizes, shared)
    activations = find_activations(flow, linears, roles)
    layers = [
        Layer(
            name,
            tuple(call.name for call in group),
            sources[name],
            roles.get(name, ()),
            activations.get(name, NO_ACTIVATION),
        )
        for name, group in calls.items()
    ]
    return Layers(graph, layers, _block_layers(graph, layers))


def measure_sizes(model: ov.Model) -> dict[str, LayerSize]:
    """Measure every Linear layer of a model."""
    return {
        name: LayerSize(call.in_features, call.out_features, float(call.weight_bytes))
        for name, (call, *_) in named_calls(model).items()
    }


def name_gate_functions(model: ov.Model, ups: Iterable[str]) -> dict[str, str]:
    """
    Name the activation functions that layers' outputs are multiplied by, and nothing else.

    :param ups: The layers; those of which that does not hold are left out.
    :return: The functions' modules, or nodes where no module is known, by layer.
    """
    calls = named_calls(model)
    found = {}
    for up in ups:
        factor = find_factor(calls[up][0]) if len(calls[up]) == 1 else None
        if factor is not None:
            name = factor.get_source_output().get_node().get_friendly_name()
            found[up] = module_of_node(name) or name
    return found


def _block_layers(graph: NNCFGraph, layers: list[Layer]) -> list[Layer]:
    """
    Keep the layers of the model's repeated blocks.

    Names tell blocks as torch does: the elements of a list have a number (``model.layers.0.mlp.up_proj``). Where no
    name has one, these are all layers but the head: the only layer, if there is only one, that a result of the model
    is computed from without another one in between.
    """
    inside = [layer for layer in layers if re.search(r"(^|[./])\d+[./]", layer.name)]
    if inside:
        return inside
    flow = Flow(graph, OPERATIONS)
    linears = {node for node, info in flow.nodes.items() for layer in layers if info.node_name in layer.nodes}
    results = [node for node in flow.nodes if flow.type_of(node) == "Result"]
    last = flow.upstream(results, lambda node: node in linears) & linears
    head = {flow.nodes[node].node_name for node in last} if len(last) == 1 else set()
    return [layer for layer in layers if not head & {*layer.nodes}]
