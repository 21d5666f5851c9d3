"""Walks over the data flow of a model's NNCF graph."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from nncf.common.graph.graph import NNCFGraph

CONSTANT = "nncf_model_const"
INPUT = "nncf_model_input"
SHAPE = "shape"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph: output `port` of the node with id `node`."""

    node: int
    port: int


class Flow:
    """
    Follow the data flow of an NNCF graph.

    What depends on constants alone (weights, their decompression, rotary tables) is not part of it, nor is what depends
    on the shapes of tensors alone.

    :param operations: For a graph that is not of a torch model: what torch calls its operations.
    :param aside: Nodes into which nothing is to flow: what is computed from them alone is as good as constant.
    """

    def __init__(
        self, graph: NNCFGraph, operations: Mapping[str, str] | None = None, aside: Collection[int] = ()
    ) -> None:
        self.nodes = {node.node_id: node for node in graph.get_all_nodes()}
        self._operations = operations or {}
        inputs = {i: [Tensor(e.from_node.node_id, e.output_port_id) for e in graph.get_input_edges(n)]
                  if self.type_of(i) != SHAPE and i not in aside else [] for i, n in self.nodes.items()}  # fmt: skip
        self.dynamic = _reachable(inputs, [i for i in self.nodes if self.type_of(i) == INPUT])
        self.inputs = {i: [t for t in ts if t.node in self.dynamic] for i, ts in inputs.items()}
        self.constant_inputs = {i: [t for t in ts if t.node not in self.dynamic] for i, ts in inputs.items()}

    def type_of(self, node: int) -> str:
        """
        Name the operation of a node.

        :return: The operation's name, such as ``linear`` or ``silu``.
        """
        kind = self.nodes[node].node_type
        return self._operations.get(kind, kind)

    def upstream(self, starts: Iterable[int], stop: Callable[[int], bool]) -> set[int]:
        """
        Walk against the data flow.

        :param starts: Nodes to start from; they are part of the result.
        :param stop: Nodes for which it is true are visited but not walked past.
        """
        seen: set[int] = set()
        todo = list(starts)
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if not stop(node):
                todo.extend(tensor.node for tensor in self.inputs[node])
        return seen

    def origin(self, tensor: Tensor, same_values: Collection[str]) -> Tensor:
        """
        Find the tensor whose values another one has.

        :param same_values: Operations that hand on the same values, so that two layers behind them read one tensor.
        """
        while self.type_of(tensor.node) in same_values and len(self.inputs[tensor.node]) == 1:
            tensor = self.inputs[tensor.node][0]
        return tensor

    def last_nodes(self) -> list[int]:
        """List the nodes that no other reads: the model's outputs."""
        read = {tensor.node for tensors in self.inputs.values() for tensor in tensors}
        return [node for node in self.dynamic if node not in read]

    def constants_of(self, node: int) -> list[str]:
        """List the parameters and buffers that a node's constant inputs are computed from."""
        names: list[str] = []
        todo = [t.node for t in self.constant_inputs[node]]
        while todo:
            current = todo.pop()
            if self.type_of(current) == CONSTANT:
                names.append(self.nodes[current].node_name)
            todo.extend(t.node for t in self.constant_inputs[current])
        return names


def _reachable(inputs: dict[int, list[Tensor]], roots: list[int]) -> set[int]:
    consumers: dict[int, list[int]] = {}
    for node, tensors in inputs.items():
        for tensor in tensors:
            consumers.setdefault(tensor.node, []).append(node)
    seen: set[int] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(consumers.get(node, ()))
    return seen
