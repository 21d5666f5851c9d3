"""The feed-forward networks of a model, and masks on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actsparse.errors import ActsparseError, ScopeError
from actsparse.scopes.layers import Layer
from actsparse.sparsify import remove_sparsifiers
from actsparse.torch.gates import find_gate_functions
from actsparse.torch.insertion import insert_sparsifier
from actsparse.torch.layers import find_layers, name_blocks, trace_graph
from actsparse.torch.running import evaluation_mode
from actsparse.torch.sparsifier import ActivationSparsifier

# Names of the masks, in reports and thresholds files.
TOPK, FAT, CETT = "topk", "fat", "cett"


@dataclass(frozen=True)
class Network:
    """
    A feed-forward network.

    :param up: In a gated network the layer that gives the other factor of a; else empty.
    :param gate_function: The module that computes f(gate(x)); empty where nothing is gated: there a is f itself.
    """

    down: Layer
    up: str = ""
    gate_function: str = ""


class TopKSparsifier(ActivationSparsifier):
    """
    Zero all but the largest entries of every token; a mask without a threshold, for studies.

    :param share: The share of entries to keep, in (0, 1].
    :param options: As for `ActivationSparsifier`.
    """

    def __init__(self, share: float, **options: Any) -> None:
        super().__init__(1 - share, algorithm=TOPK, **options)
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Mask.

        :param x: Activations, [..., channels].
        """
        if not self.is_active:
            return x
        kept = max(1, round(self.share * x.shape[-1]))
        indices = x.abs().topk(kept, dim=-1).indices
        return torch.zeros_like(x).scatter(-1, indices, x.gather(-1, indices))


def find_networks(model: nn.Module, example: Mapping[str, Any], *, needs_gates: bool) -> list[Network]:
    """
    Find the feed-forward networks of every block.

    :raises ActsparseError: If there are none, or a gate cannot be found.
    """
    with evaluation_mode(model):
        layers = find_layers(model, trace_graph(model, example))
    downs = [layer for layer in layers if "ffn.down" in layer.roles]
    if not downs:
        msg = f"{type(model).__name__} has no feed-forward network of a known form: no layer has the role ffn.down"
        raise ScopeError(msg)
    if not needs_gates:
        return [Network(down) for down in downs]
    functions = find_gate_functions(model, example, layers, layers)
    networks = []
    for names in name_blocks(model, [layer.name for layer in layers]).values():
        block = [layer for layer in layers if layer.name in names]
        gated = [layer for layer in block if "ffn.gate" in layer.roles]
        ups = [layer.name for layer in block if layer.name in functions]
        for down in (layer for layer in block if "ffn.down" in layer.roles):
            if gated and len(ups) != 1:
                msg = f"the gate before {down.name} is no layer of its own: {TOPK} and {FAT} are not for this model"
                raise ActsparseError(msg)
            networks.append(Network(down, ups[0], functions[ups[0]]) if gated else Network(down))
    return networks


def mask_outputs(model: nn.Module, thresholds: Mapping[str, torch.Tensor]) -> None:
    """
    Mask what down projections read.

    :param thresholds: By layer, [in_features].
    """
    remove_sparsifiers(model)
    for name, threshold in thresholds.items():
        sparsifier = ActivationSparsifier(0.0, roles=("ffn.down",), site=name, algorithm=CETT)
        sparsifier.set_threshold(threshold)
        insert_sparsifier(model, name, sparsifier)


def mask_gates(model: nn.Module, networks: list[Network], method: str, values: Sequence[float]) -> None:
    """
    Mask f(gate(x)): what it is multiplied by and the weights that read the product become useless with it.

    :param method: `TOPK` or `FAT`.
    """
    remove_sparsifiers(model)
    for network, value in zip(networks, values, strict=True):
        name = network.down.name
        site = network.up or name
        options: dict[str, Any] = {"rows_of": network.up, "roles": ("ffn.up" if network.up else "ffn.down",)}
        if method == TOPK:
            sparsifier: ActivationSparsifier = TopKSparsifier(value, site=site, **options)
        else:
            sparsifier = ActivationSparsifier(0.0, site=site, algorithm=FAT, **options)
            sparsifier.set_threshold(torch.tensor(value))
        insert_sparsifier(model, network.gate_function or name, sparsifier)
        if network.up:
            # Masks what is zero already, so that it is counted, and skipped where masks are skipped.
            zeros = ActivationSparsifier(0.0, roles=("ffn.down",), site=name, algorithm=method)
            zeros.set_threshold(torch.tensor(0.0))
            insert_sparsifier(model, name, zeros)
