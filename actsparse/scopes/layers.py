"""The Linear layers of a model, as scopes see them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nncf.common.graph.graph import NNCFGraph

from actsparse.scopes.graph import Tensor
from actsparse.scopes.zeros import NO_ACTIVATION, Activation


@dataclass(frozen=True)
class Layer:
    """
    A Linear layer (`torch.nn.Linear`, transformers' `Conv1D`, or what became of them) and where it stands.

    :param name: Module name, such as ``model.layers.0.mlp.up_proj``.
    :param nodes: Names of its calls in the NNCF graph, in order.
    :param inputs: The graph's tensors that it reads, one per call.
    :param roles: What it does in its block; empty where no graph pattern fits.
    :param activation: For a down projection, and an up projection with a gate of its own: that of their network.
    """

    name: str
    nodes: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    roles: tuple[str, ...] = ()
    activation: Activation = NO_ACTIVATION


@dataclass(frozen=True)
class Layers:
    """
    The Linear layers of a model, with the graph that they were found on.

    :param all: Every Linear layer that the model calls, in call order.
    :param of_blocks: Those of the model's repeated blocks that can be masked: what a single target sparsity applies to.
    :param bypassed: Those whose weights the model reads without calling them, so that no mask of theirs would run.
    :param others: What the model has instead of layers that can be masked, for an error message.
    """

    graph: NNCFGraph
    all: Sequence[Layer]
    of_blocks: Sequence[Layer]
    bypassed: Collection[str] = ()
    others: str = ""


class LayerSize(NamedTuple):
    """How large a layer is."""

    channels: int
    outputs: int
    weight_bytes: float
