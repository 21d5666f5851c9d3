"""Attention heads and neurons: the units that studies switch off, found by role."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actsparse.errors import ActsparseError, ScopeError
from actsparse.scopes.layers import Layer
from actsparse.torch.layers import find_layers, in_features, name_blocks, out_features, trace_graph
from actsparse.torch.running import evaluation_mode
from actsparse.torch.wrappers import get_layer

HEADS, NEURONS = "heads", "neurons"
# The layer that reads the units' outputs, and the layers whose parameters they share.
READERS = {HEADS: "attention.out", NEURONS: "ffn.down"}
_FAMILIES = {HEADS: "attention.", NEURONS: "ffn."}


@dataclass(frozen=True)
class UnitLayer:
    """
    The units of one layer: their outputs side by side are what one Linear layer reads.

    :param kind: `HEADS` or `NEURONS`.
    :param width: How many entries each has: 1 for a neuron, the head dimension for a head.
    """

    name: str
    kind: str
    count: int
    width: int
    parameters: int

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """
        Tell the units apart.

        :param x: What the layer reads, [..., count · width].
        :return: A view, [..., count, width].
        """
        return x.unflatten(-1, (self.count, self.width))

    def spread(self, keep: torch.Tensor) -> torch.Tensor:
        """
        Turn a choice of units into a choice of entries.

        :param keep: [..., count].
        :return: [..., count · width].
        """
        return keep.repeat_interleave(self.width, dim=-1)


def find_units(model: nn.Module, example: Mapping[str, Any]) -> dict[str, UnitLayer]:
    """
    Find the attention heads and the neurons of a causal language model.

    :raises ActsparseError: If it has none, or they cannot be told apart.
    """
    # Experts lie in 3-D parameters; split into layers, each would see a few tokens only.
    if any(parameter.ndim == 3 and "experts" in name for name, parameter in model.named_parameters()):
        msg = f"{type(model).__name__} has experts: studies of heads and neurons are for dense models"
        raise ActsparseError(msg)
    with evaluation_mode(model):
        layers = find_layers(model, trace_graph(model, example))
    heads = _count_heads(model)
    found: dict[str, UnitLayer] = {}
    by_name = {layer.name: layer for layer in layers}
    for names in name_blocks(model, by_name).values():
        block = [by_name[name] for name in names]
        for kind, role in READERS.items():
            for layer in block:
                if role in layer.roles:
                    count = heads if kind == HEADS else in_features(get_layer(model, layer.name))
                    found[layer.name] = _make_layer(model, layer, kind, count, block)
    missing = next((kind for kind in READERS if all(x.kind != kind for x in found.values())), None)
    if missing is not None:
        msg = f"no {missing} were found in {type(model).__name__}: no layer has the role {READERS[missing]}"
        raise ScopeError(msg)
    return {name: found[name] for name in by_name if name in found}


def _count_heads(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1:
        msg = f"the configuration of {type(model).__name__} does not say how many attention heads a layer has"
        raise ActsparseError(msg)
    return heads


def _make_layer(model: nn.Module, layer: Layer, kind: str, count: int, block: list[Layer]) -> UnitLayer:
    channels = in_features(get_layer(model, layer.name))
    if channels % count:
        msg = f"{layer.name} reads {channels} channels, which are not those of {count} heads"
        raise ActsparseError(msg)
    family = [x.name for x in block if any(role.startswith(_FAMILIES[kind]) for role in x.roles)]
    modules = [model.get_submodule(name) for name in family]
    parameters = sum(in_features(module) * out_features(module) for module in modules)
    return UnitLayer(layer.name, kind, count, channels // count, parameters)
