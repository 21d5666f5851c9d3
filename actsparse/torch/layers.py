"""The Linear layers of a torch model, found on its NNCF graph."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph
from torch import nn
from transformers.pytorch_utils import Conv1D

from actsparse.scopes.graph import Flow
from actsparse.scopes.layers import Layer, LayerSize
from actsparse.scopes.roles import find_roles
from actsparse.scopes.zeros import NO_ACTIVATION, find_activations
from actsparse.torch.offload import placeholder_weights
from actsparse.torch.wrappers import as_written, get_layer, named_adapters, named_linears

LINEAR_OPERATIONS = ("linear", "addmm", "matmul")
# Operations that hand on the same values, so that two layers behind them still read one tensor.
SAME_VALUES = ("view", "reshape", "contiguous", "dropout", "to", "type", "flatten", "clone", "detach")


def trace_graph(model: nn.Module, example_input: Any) -> NNCFGraph:
    """
    Build the NNCF graph of a model without changing the model.

    :param example_input: One model input: a tensor, a tuple of arguments or a dict of keyword arguments.
    :return: The graph that `nncf.build_graph` gives for the same model.
    """
    with torch.no_grad(), placeholder_weights(model), as_written():
        return build_nncf_graph(model, example_input)


def in_features(module: nn.Module) -> int:
    """
    Count the input channels of a Linear layer, whatever its weight is packed into.

    :param module: A `torch.nn.Linear` or `Conv1D`.
    """
    return module.in_features if isinstance(module, nn.Linear) else int(module.nx)  # type: ignore[arg-type]


def out_features(module: nn.Module) -> int:
    """
    Count the output channels of a Linear layer, whatever its weight is packed into.

    :param module: A `torch.nn.Linear` or `Conv1D`.
    """
    return module.out_features if isinstance(module, nn.Linear) else int(module.nf)  # type: ignore[arg-type]


def weight_bytes(module: nn.Module) -> int:
    """
    Measure the weight of a Linear layer as it is stored.

    :param module: A `torch.nn.Linear` or `Conv1D`.
    """
    return module.weight.numel() * module.weight.element_size()  # type: ignore[operator, union-attr]


def measure_sizes(model: nn.Module) -> dict[str, LayerSize]:
    """Measure every Linear layer of a model."""
    return {
        name: LayerSize(in_features(module), out_features(module), float(weight_bytes(module)))
        for name, module in named_linears(model)
    }


def find_layers(model: nn.Module, graph: NNCFGraph) -> list[Layer]:
    """Find the Linear layers that a model calls, with their graph nodes, inputs and roles."""
    flow = Flow(graph)
    adapters = _find_calls(model, flow, named_adapters(model))
    if adapters:
        flow = Flow(graph, aside={node for nodes in adapters.values() for node in nodes})
    calls = _find_calls(model, flow, named_linears(model))
    modules = {name: get_layer(model, name) for name in calls}
    sizes = {name: (in_features(module), out_features(module)) for name, module in modules.items()}
    inputs = {name: tuple(flow.origin(flow.inputs[n][0], SAME_VALUES) for n in nodes) for name, nodes in calls.items()}
    linears = {n: name for name, nodes in calls.items() for n in nodes}
    roles = find_roles(flow, linears, sizes, inputs)
    activations = find_activations(flow, linears, roles)
    return [
        Layer(
            name,
            tuple(flow.nodes[n].node_name for n in nodes),
            inputs[name],
            roles.get(name, ()),
            activations.get(name, NO_ACTIVATION),
        )
        for name, nodes in calls.items()
    ]


def block_layers(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """
    Keep the layers of the model's repeated blocks: what a single target sparsity applies to.

    Blocks are the elements of an `nn.ModuleList`, where every transformer keeps them; embeddings and the language
    modelling head stand outside. A model without any such block gives all its Linear layers but its output embedding.
    """
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name)
    inside = [layer for layer in layers if layer.name.startswith(lists)]
    if inside or any(_is_linear(module) for name, module in model.named_modules() if name.startswith(lists)):
        return inside
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return [layer for layer in layers if get_layer(model, layer.name) is not head]


def describe_others(model: nn.Module, layers: Iterable[Layer]) -> str:
    """
    Say what a model has instead of Linear layers that can be masked.

    :param layers: Those that can be.
    :return: For an error message.
    """
    known = {layer.name for layer in layers}
    kinds = Counter(
        type(module).__name__ for name, module in model.named_modules() if name not in known and _is_linear(module)
    )
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    return f"what it has ({named}) multiplies by code of its own, as quantized weights do" if named else ""


def name_blocks(model: nn.Module, layers: Iterable[str]) -> dict[str, list[str]]:
    """
    Name the blocks that layers belong to.

    :return: The layers by block; those that are in none under the empty name.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name]
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        # The outermost list: experts in a block are part of it.
        owner = min((name for name in lists if layer.startswith(f"{name}.")), key=len, default=None)
        number = layer.removeprefix(f"{owner}.").partition(".")[0]
        blocks.setdefault(f"{owner}.{number}" if owner else "", []).append(layer)
    return blocks


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a Linear layer, or says so."""
    return isinstance(module, nn.Linear | Conv1D) or "linear" in type(module).__name__.lower()


def _find_calls(model: nn.Module, flow: Flow, linears: Iterable[tuple[str, nn.Module]]) -> dict[str, list[int]]:
    by_weight: dict[int, list[str]] = {}
    for name, module in linears:
        by_weight.setdefault(id(module.weight), []).append(name)
    calls: dict[str, list[int]] = {}
    for node in sorted(flow.dynamic) if by_weight else ():
        name = _layer_of(model, flow, node, by_weight)
        if name is not None:
            calls.setdefault(name, []).append(node)
    return calls


def _layer_of(model: nn.Module, flow: Flow, node: int, by_weight: dict[int, list[str]]) -> str | None:
    if flow.type_of(node) not in LINEAR_OPERATIONS or len(flow.inputs[node]) != 1:
        return None
    for constant in flow.constants_of(node):
        owner, _, attribute = constant.rpartition(".")
        if attribute != "weight":
            continue
        names = by_weight.get(id(model.get_submodule(owner).weight), [])
        # Layers that share one weight (a head tied to another layer) are told apart by where the call happens.
        called = [n for n in names if _without_indices(n) == "/".join(flow.nodes[node].node_name.split("/")[:-2])]
        if names:
            return (called or names)[0]
    return None


def _without_indices(name: str) -> str:
    return "/".join(part for part in name.split(".") if not part.isdigit())
