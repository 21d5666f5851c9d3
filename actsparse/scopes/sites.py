"""Sites: the layers that read one tensor, so that one list of kept channels serves them all."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actsparse.scopes.graph import Tensor
from actsparse.scopes.layers import Layer


@dataclass(frozen=True)
class Site:
    """
    Layers that one masked tensor serves: their input, or what their outputs are multiplied by.

    :param gate_function: For a layer of which rows are masked, the activation function whose output is masked; empty
        for layers whose input is masked.
    """

    name: str
    layers: tuple[Layer, ...]
    gate_function: str = ""


def group_sites(layers: Iterable[Layer], gate_functions: Mapping[str, str] | None = None) -> list[Site]:
    """
    Group layers by the tensor that is masked.

    :param gate_functions: The activation functions of the layers of which rows are masked: each is a site of its own.
    :return: The sites in call order of their first layers.
    """
    gates = gate_functions or {}
    groups: dict[tuple[Tensor, ...] | str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.name if layer.name in gates else layer.inputs, []).append(layer)
    return [Site(group[0].name, tuple(group), gates.get(group[0].name, "")) for group in groups.values()]
