"""What an allocation shares a target among."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actsparse.scopes import LayerSize, Site
from actsparse.scopes.matching import Target


@dataclass(frozen=True)
class LayerGroup:
    """
    The layers of one site under one scope: they are given one sparsity.

    :param is_of_rows: Whether rows of the weights are masked, and not input channels; `channels` then counts rows.
    :param behind: The site whose masked tensor makes zeros in what these layers read, by a product; empty if none does.
    :param outputs: Output channels, of all layers together.
    """

    site: str
    layers: tuple[str, ...]
    channels: int
    layer_bytes: tuple[float, ...]
    is_of_rows: bool = False
    behind: str = ""
    outputs: int = 0
    role: str = ""

    @property
    def weight_bytes(self) -> float:
        """All that a dense token reads."""
        return sum(self.layer_bytes)

    @property
    def cost(self) -> float:
        """Bytes of weights that one kept channel costs."""
        return self.weight_bytes / self.channels


# Target sparsity and groups of each scope.
Scopes = Sequence[tuple[float, Sequence[LayerGroup]]]


def gather_groups(
    sites: Sequence[Site], targets: Mapping[str, Target], sizes: Mapping[str, LayerSize]
) -> list[tuple[float, list[LayerGroup]]]:
    """
    Gather the groups of each scope.

    :return: The target sparsity and the groups of each scope.
    """
    rows = _rows_before(sites)
    scopes: dict[Target, list[LayerGroup]] = {}
    for site in sites:
        for target in dict.fromkeys(targets[layer.name] for layer in site.layers):
            names = tuple(layer.name for layer in site.layers if targets[layer.name] == target)
            group = LayerGroup(
                site.name,
                names,
                sizes[names[0]].outputs if site.gate_function else sizes[names[0]].channels,
                tuple(sizes[name].weight_bytes for name in names),
                is_of_rows=bool(site.gate_function),
                behind=rows.get(site.name, ""),
                outputs=sum(sizes[name].outputs for name in names),
                # A site of gate and up, which read one tensor, is one kind of site; a mask of rows is another.
                role="+".join(dict.fromkeys(role for layer in site.layers for role in layer.roles)),
            )
            scopes.setdefault(target, []).append(group)
    return [(target.sparsity, groups) for target, groups in scopes.items()]


def _rows_before(sites: Sequence[Site]) -> dict[str, str]:
    """Tell for each down projection the site whose rows are masked in the same feed-forward network."""
    found: dict[str, str] = {}
    last = ""
    for site in sites:  # in call order
        if site.gate_function:
            last = site.name
        elif last and any("ffn.down" in layer.roles for layer in site.layers):
            found[site.name], last = last, ""
    return found
