"""Find feed-forward networks whose two sites can run as one operation."""

from dataclasses import dataclass

import numpy as np
import openvino as ov

from actsparse.openvino.graph_masks import GraphMask
from actsparse.openvino.linear import Linear, find_constant


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network without biases: down(f(gate(x)) * up(x)), or down(f(up(x))).

    :param inner: The layers that read x: (gate, up), or (up,).
    :param activation: The name of f, as the extension knows it.
    """

    inner: tuple[Linear, ...]
    activation: str


@dataclass(frozen=True)
class Gated:
    """
    A feed-forward network whose gate tells which rows of up matter: down(mask(f(gate(x))) * up(x)).

    :param activation: The name of f, as the extension knows it.
    """

    gate: Linear
    activation: str
    up: Linear
    hidden: ov.Output


def find_feed_forward(hidden: ov.Output, linears: dict[str, Linear], tokens: str = "all") -> FeedForward | None:
    """Return the layers that compute a hidden vector, if nothing but an activation and a product lies between.

    :param hidden: What the last layer of the network reads (before its mask).
    :param linears: The Linear layers of the model by name.
    :param tokens: Which tokens its mask is for.
    :return: None where the pattern does not hold, or where another node needs what lies between.
    """
    node = hidden.get_node()
    if not _is_only_masked(hidden, tokens):
        return None
    found = _behind_activation(hidden, linears)
    if found is None and node.get_type_name() == "Multiply":
        factors = [node.input_value(0), node.input_value(1)]
        for gated, up in (factors, factors[::-1]):
            gate = _behind_activation(gated, linears)
            up_layer = linears.get(up.get_node().get_friendly_name())
            if gate and up_layer and _has_one_reader(gated) and _has_one_reader(up):
                return FeedForward((gate[0], up_layer), gate[1])
    return FeedForward((found[0],), found[1]) if found else None


def find_gated(mask: GraphMask, linears: dict[str, Linear]) -> Gated | None:
    """
    Return the feed-forward network that a mask of rows is part of.

    :return: None where the pattern does not hold, or where another node needs what lies between.
    """
    behind = _behind_activation(mask.source, linears)
    up = mask.linears[0]
    if behind is None or not _is_only_masked(mask.source, mask.tokens) or not _has_one_reader(up.node.output(0)):
        return None
    (product,) = mask.select.output(0).get_target_inputs()
    return Gated(*behind, up, product.get_node().output(0))


def _behind_activation(output: ov.Output, linears: dict[str, Linear]) -> tuple[Linear, str] | None:
    """Return the layer that an activation function reads, and the function's name."""
    name = _activation(output.get_node())
    if name is None:
        return None
    before = output.get_node().input_value(0)
    if name == "relu_squared":
        if any(reader.get_node().get_name() != output.get_node().get_name() for reader in before.get_target_inputs()):
            return None
        before = before.get_node().input_value(0)
    layer = linears.get(before.get_node().get_friendly_name())
    return (layer, name) if layer and _has_one_reader(before) else None


def _activation(node: ov.Node) -> str | None:
    kind = node.get_type_name()
    if kind == "Swish":
        beta = find_constant(node.input_value(1)) if node.get_input_size() > 1 else None
        is_plain = node.get_input_size() == 1 or (beta is not None and np.all(np.asarray(beta.data) == 1))
        return "silu" if is_plain else None
    if kind == "Relu":
        return "relu"
    if kind in ("Power", "Multiply") and node.input_value(0).get_node().get_type_name() == "Relu":
        power = find_constant(node.input_value(1)) if kind == "Power" else None
        is_square = node.input_value(0) == node.input_value(1)
        is_square |= power is not None and bool(np.all(np.asarray(power.data) == 2))
        return "relu_squared" if is_square else None
    if kind == "Gelu":
        mode = str(node.get_attributes().get("approximation_mode", "ERF")).lower()
        return "gelu_tanh" if mode == "tanh" else "gelu_erf"
    return None


def _is_only_masked(output: ov.Output, tokens: str) -> bool:
    # A mask of decoded tokens reads the shape too.
    readers = {"Abs", "Select"} | ({"ShapeOf"} if tokens == "decode" else set())
    return all(reader.get_node().get_type_name() in readers for reader in output.get_target_inputs())


def _has_one_reader(output: ov.Output) -> bool:
    return len(output.get_target_inputs()) == 1
