"""What each Linear layer does in its block, told from graph patterns, so that it holds for any architecture."""

from collections.abc import Collection

from actsparse.scopes.graph import INPUT, Flow, Tensor

# fmt: off
ACTIVATION_FUNCTIONS = frozenset((
    "relu", "relu_", "relu6", "leaky_relu", "prelu", "gelu", "silu", "silu_", "sigmoid", "tanh", "elu", "selu", "celu",
    "softplus", "mish", "hardswish", "hardsigmoid", "hardtanh", "erf", "logsigmoid", "threshold",
))
# Functions that give zero for many numbers. A comparison gives zeros for a product; a `where` chooses between x and 0.
ZERO_MAKERS = frozenset((
    "relu", "relu_", "relu6", "threshold", "threshold_", "hardshrink", "softshrink", "where", "masked_fill",
    "masked_fill_", "gt", "ge", "lt", "le", "__gt__", "__ge__", "__lt__", "__le__",
))
# fmt: on
MATRIX_PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__"))
ATTENTION, SOFTMAX = "scaled_dot_product_attention", "softmax"
# What mixes tokens, besides attention: state-space models, convolutions, linear recurrences.
_MIXERS = frozenset(
    ("conv1d", "conv2d", "cumsum", "cumprod", "Convolution", "GroupConvolution", "Loop", "TensorIterator")
)


def find_roles(
    flow: Flow,
    linears: dict[int, str],
    sizes: dict[str, tuple[int, int]],
    inputs: dict[str, tuple[Tensor, ...]],
) -> dict[str, tuple[str, ...]]:
    """
    Find the roles of Linear layers in attention and feed-forward networks, and the output head.

    Walking against the data flow and stopping at Linear layers and attention products:

    - ``attention.qkv``: what an attention product is computed from, fused or not: a product of two computed tensors on
      either side of a softmax. A product without one is that of a state-space model or another mixer, whose layers have
      no role;
    - ``attention.out``: a layer computed from an attention product;
    - ``ffn.down``: a layer computed from one input tensor through one or two Linear layers and an activation
      function, giving back as many channels as those layers read;
    - with two Linear layers, ``ffn.gate`` is the one behind the activation function and ``ffn.up`` the other;
    - with one as wide as the down projection's input, that is ``ffn.in``; twice as wide, it is both gate and up;
    - ``head``: a layer without another role that one of the model's outputs is computed from, and from nothing else,
      and no other Linear layer: what mixers keep of a text for later, and what routers chose, are outputs too.
    """
    products = _attention_products(flow, linears)
    roles: dict[str, dict[str, None]] = {}

    def assign(name: str, *given: str) -> None:
        for role in given:
            roles.setdefault(name, {})[role] = None

    def stop(node: int) -> bool:
        return node in linears or node in products

    for product in products:
        for node in flow.upstream((t.node for t in flow.inputs[product]), stop) & linears.keys():
            assign(linears[node], "attention.qkv")
    inner: set[str] = set()
    for node, down in linears.items():
        cone = flow.upstream((t.node for t in flow.inputs[node]), stop)
        inner |= {linears[n] for n in cone & linears.keys()} - {down}
        if cone & products:
            assign(down, "attention.out")
            continue
        for name, role in _ffn_roles(flow, node, cone, linears, sizes, inputs):
            assign(name, role)
    for output in flow.last_nodes():
        cone = flow.upstream([output], stop)
        ends = {node for node in cone if stop(node) or not flow.inputs[node]}
        heads = {linears[node] for node in ends & linears.keys()}
        if len(ends) == 1 and heads and not heads & (roles.keys() | inner):
            assign(*heads, "head")
    return {name: tuple(given) for name, given in roles.items()}


def is_alone(role: str, roles: tuple[str, ...]) -> bool:
    """
    Tell gate or up from a layer that is both at once.

    :param role: ``ffn.gate`` or ``ffn.up``.
    :param roles: A layer's.
    :return: Whether it has this role of the two, and not the other.
    """
    return role in roles and not {"ffn.gate", "ffn.up"} <= {*roles}


def _attention_products(flow: Flow, linears: Collection[int]) -> set[int]:
    """Find the products of attention: fused ones, and those in front of a softmax and behind it."""
    products = {node for node in flow.nodes if node not in linears and _is_product(flow, node)}

    def stop(node: int) -> bool:
        return node in linears or node in products

    found = {node for node in flow.nodes if flow.type_of(node) == ATTENTION}
    for product in products:
        for tensor in flow.inputs[product]:
            cone = flow.upstream([tensor.node], lambda node: stop(node) or flow.type_of(node) == SOFTMAX)
            shares = [node for node in cone if flow.type_of(node) == SOFTMAX]
            scores = flow.upstream((x.node for node in shares for x in flow.inputs[node]), stop) & products
            if scores:
                found |= {product, *scores}
    return found


def _is_product(flow: Flow, node: int) -> bool:
    return flow.type_of(node) in MATRIX_PRODUCTS and len(flow.inputs[node]) >= 2


def _ffn_roles(
    flow: Flow,
    down_node: int,
    cone: set[int],
    linears: dict[int, str],
    sizes: dict[str, tuple[int, int]],
    inputs: dict[str, tuple[Tensor, ...]],
) -> list[tuple[str, str]]:
    down = linears[down_node]
    first_nodes = sorted(cone & linears.keys())
    first = list(dict.fromkeys(linears[n] for n in first_nodes))
    activations = {n for n in cone if flow.type_of(n) in ACTIVATION_FUNCTIONS | ZERO_MAKERS}
    is_ffn = (
        len(first) in (1, 2)
        and bool(activations)
        and all(flow.type_of(n) not in (INPUT, "embedding", *_MIXERS) and not _is_product(flow, n) for n in cone)
        and len({inputs[name] for name in first}) == 1
        and sizes[down][1] == sizes[first[0]][0]
    )
    if not is_ffn:
        return []
    width = sizes[down][0]
    if len(first) == 1:
        if sizes[first[0]][1] == width:
            return [(first[0], "ffn.in"), (down, "ffn.down")]
        if sizes[first[0]][1] == 2 * width:
            return [(first[0], "ffn.gate"), (first[0], "ffn.up"), (down, "ffn.down")]
        return []
    behind = flow.upstream(activations, lambda n: n in linears)
    # A layer whose values reach the activation function gates the other; where both do, the first called gates.
    gates = [linears[n] for n in first_nodes if n in behind]
    gate = gates[0]
    up = next(name for name in first if name != gate)
    return [(gate, "ffn.gate"), (up, "ffn.up"), (down, "ffn.down")]
