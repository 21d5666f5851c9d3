"""What an allocation shares a target among."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actsparse.scopes import Site
from actsparse.scopes.matching import Target


@dataclass(frozen=True)
class Part:
    """
    The layers of one site under one scope: they are given one sparsity.

    :param site: The site.
    :param layers: Their names.
    :param channels: Input channels.
    :param layer_bytes: The size of each one's weights.
    """

    site: str
    layers: tuple[str, ...]
    channels: int
    layer_bytes: tuple[float, ...]

    @property
    def weight_bytes(self) -> float:
        """All that a dense token reads."""
        return sum(self.layer_bytes)

    @property
    def cost(self) -> float:
        """Bytes of weights that one kept channel costs."""
        return self.weight_bytes / self.channels


def gather_parts(
    sites: Sequence[Site], targets: Mapping[str, Target], sizes: Mapping[str, tuple[int, float]]
) -> list[tuple[float, list[Part]]]:
    """
    Gather the parts of each scope.

    :param sites: The sites.
    :param targets: The target of each layer.
    :param sizes: Input channels and weight bytes of each layer.
    :return: The target sparsity and the parts of each scope.
    """
    scopes: dict[Target, list[Part]] = {}
    for site in sites:
        for target in dict.fromkeys(targets[layer.name] for layer in site.layers):
            names = tuple(layer.name for layer in site.layers if targets[layer.name] == target)
            part = Part(site.name, names, sizes[names[0]][0], tuple(sizes[name][1] for name in names))
            scopes.setdefault(target, []).append(part)
    return [(target.sparsity, parts) for target, parts in scopes.items()]
