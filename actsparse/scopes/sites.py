"""Sites: the layers that read one tensor, so that one list of kept channels serves them all."""

from collections.abc import Iterable
from dataclasses import dataclass

from actsparse.scopes.graph import Tensor
from actsparse.scopes.layers import Layer


@dataclass(frozen=True)
class Site:
    """
    Layers that share their input tensor.

    :param name: Name of the first layer called.
    :param layers: The layers in call order.
    """

    name: str
    layers: tuple[Layer, ...]


def group_sites(layers: Iterable[Layer]) -> list[Site]:
    """
    Group layers by the tensor they read.

    :param layers: Layers in call order.
    :return: The sites in call order of their first layers.
    """
    groups: dict[tuple[Tensor, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.inputs, []).append(layer)
    return [Site(group[0].name, tuple(group)) for group in groups.values()]
