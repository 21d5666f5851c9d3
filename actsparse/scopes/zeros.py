"""Feed-forward networks whose activations are zero by themselves, told from graph patterns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from actsparse.scopes.graph import Flow, Tensor
from actsparse.scopes.roles import ACTIVATION_FUNCTIONS, ZERO_MAKERS, is_alone

# fmt: off
# Functions f with f(0) = 0 of one input: what is zero in front of them is zero behind them.
_KEEPERS = frozenset((
    "gelu", "silu", "silu_", "tanh", "leaky_relu", "elu", "mish", "pow", "__pow__", "square", "sqrt", "neg", "view",
    "reshape", "flatten", "contiguous", "clone", "detach", "to", "type", "float", "dropout", "Convert", "Reshape",
    "Squeeze", "Unsqueeze",
))
# fmt: on
_PRODUCTS = frozenset(("mul", "__mul__", "__rmul__", "__imul__", "multiply"))


@dataclass(frozen=True)
class Activation:
    """
    The activation of a feed-forward network.

    :param functions: The functions that it computes, as the graph names them.
    :param zeroed_by: For the down projection what makes its input zero, for the up projection what makes the gate zero
        that its output is multiplied by; empty where nothing does.
    """

    functions: tuple[str, ...] = ()
    zeroed_by: str = ""


NO_ACTIVATION = Activation()


def find_activations(
    flow: Flow, linears: Mapping[int, str], roles: Mapping[str, tuple[str, ...]]
) -> dict[str, Activation]:
    """
    Find the activations of feed-forward networks.

    A tensor has zeros by itself behind ReLU and its kin, behind a function that keeps zero, and in a product of which
    one factor has them: so ReLU², gated ReLU, FATReLU (a threshold), dReLU and the statistical top-k of Gemma 3n,
    GELU(ReLU(x - cutoff)).

    :param linears: The nodes of Linear layers.
    :param roles: What the layers do.
    :return: Each down projection's, and each up projection's with a gate of its own.
    """
    found: dict[str, Activation] = {}
    for node, name in linears.items():
        if "ffn.down" not in roles.get(name, ()):
            continue
        hidden = flow.inputs[node][0]
        cone = flow.upstream([hidden.node], lambda n: n in linears)
        functions = tuple(sorted({flow.type_of(n) for n in cone} & (ACTIVATION_FUNCTIONS | ZERO_MAKERS)))
        found[name] = Activation(functions, _zeroed_by(flow, hidden, linears))
        ups = [linears[n] for n in cone & linears.keys() if is_alone("ffn.up", roles.get(linears[n], ()))]
        for up in ups:
            gate = _factor_beside(flow, hidden, up, linears)
            found[up] = Activation(functions, _zeroed_by(flow, gate, linears) if gate else "")
    return found


def _zeroed_by(flow: Flow, tensor: Tensor, linears: Mapping[int, str]) -> str:
    kind = flow.type_of(tensor.node)
    if tensor.node in linears:
        return ""
    if kind in ZERO_MAKERS:
        return kind
    if kind in _KEEPERS and flow.inputs[tensor.node]:
        return _zeroed_by(flow, flow.inputs[tensor.node][0], linears)
    if kind in _PRODUCTS:
        return next(filter(None, (_zeroed_by(flow, x, linears) for x in flow.inputs[tensor.node])), "")
    return ""


def _factor_beside(flow: Flow, tensor: Tensor, up: str, linears: Mapping[int, str]) -> Tensor | None:
    """Find what a layer's output, as it is, is multiplied by."""
    while flow.type_of(tensor.node) in _KEEPERS and flow.inputs[tensor.node]:
        tensor = flow.inputs[tensor.node][0]
    if flow.type_of(tensor.node) not in _PRODUCTS:
        return None
    factors = flow.inputs[tensor.node]
    others = [x for x in factors if linears.get(x.node) != up]
    return others[0] if len(factors) == 2 and len(others) == 1 else None


def describe_functions(activations: Iterable[Activation]) -> str:
    """
    Name the functions of some networks.

    :return: For an error message.
    """
    return ", ".join(sorted({name for x in activations for name in x.functions})) or "none that is known"
