"""Find the Linear layers of an OpenVINO model: multiplications by a constant weight, compressed or not."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import openvino as ov

# What may stand between a weight constant and its MatMul, and still leave it a constant.
DECOMPRESSION = {"Convert", "Subtract", "Multiply", "Reshape", "Transpose"}
# What may stand between the output head and the logits.
AFTER_HEAD = {"Add", "Convert", "Divide", "Multiply", "Tanh"}
# In the names of multiplications that compensate for what a layer's mask leaves out: they are no layers of the model.
LOW_RANK = "/low_rank_"


@dataclass(frozen=True)
class Linear:
    """
    One MatMul whose weight is a constant.

    :param input_port: Where its activations arrive, 0 or 1.
    """

    node: ov.Node
    input_port: int
    constant: ov.Node

    @property
    def name(self) -> str:
        """The node's friendly name."""
        return self.node.get_friendly_name()

    @property
    def module_name(self) -> str:
        """The torch module's name, as far as the weight constant or the node's name still tell it; else the name."""
        of_constant, of_node = module_of_constant(self.constant.get_friendly_name()), module_of_node(self.name)
        if of_constant is None or of_node is None:
            return of_constant or of_node or self.name
        # A tied weight is named after its other owner, the embedding; a node may be named after a parent of the layer.
        return of_constant if of_constant.startswith(f"{of_node}.") else of_node

    @property
    def weight_port(self) -> int:
        """The port of the weight."""
        return 1 - self.input_port

    @property
    def source(self) -> ov.Output:
        """The output that the layer reads its activations from."""
        return self.node.input_value(self.input_port)

    @property
    def is_input_transposed(self) -> bool:
        """Whether the layer's input channels are not the last dimension of its activations."""
        attributes = self.node.get_attributes()
        return attributes["transpose_a"] if self.input_port == 0 else not attributes["transpose_b"]

    @property
    def is_weight_transposed(self) -> bool:
        """Whether the weight is [out_features, in_features], as torch's Linear has it."""
        attributes = self.node.get_attributes()
        return attributes["transpose_b"] if self.weight_port == 1 else not attributes["transpose_a"]

    @property
    def in_features(self) -> int:
        """How many input channels the layer has."""
        shape = list(self.node.input_value(self.weight_port).get_shape())
        return shape[-1] if self.is_weight_transposed else shape[-2]

    @property
    def out_features(self) -> int:
        """How many output channels the layer has."""
        shape = list(self.node.input_value(self.weight_port).get_shape())
        return shape[-2] if self.is_weight_transposed else shape[-1]

    @property
    def is_plain(self) -> bool:
        """Whether the constant is the weight as it is, one of 8 bits for each [out_features, in_features]."""
        shape = [self.out_features, self.in_features]
        is_byte = self.constant.get_output_element_type(0).get_type_name() in {"u8", "i8"}
        return is_byte and self.is_weight_transposed and list(self.constant.get_output_shape(0)) == shape

    @property
    def weight_bytes(self) -> int:
        """How many bytes the weight takes as it is stored, without scales and zero points."""
        bits = int(self.constant.get_output_element_type(0).bitwidth)
        return int(np.prod(list(self.constant.get_output_shape(0)))) * bits // 8


def module_of_constant(name: str) -> str | None:
    """Return the torch module that a weight constant belongs to, or None.

    :param name: `self.model.layers.0.mlp.up_proj.weight`, `self.model….up_proj._openvino_orig_weight`, …
    """
    found = re.match(r"(?:self\.|__module\.)?(.+)\.(?:weight|_openvino_orig_weight)(?:[/_].*)?$", name)
    return found[1] if found else None


def module_of_node(name: str) -> str | None:
    """Return the torch module that a converted node belongs to, or None.

    :param name: `__module.model.layers.0.mlp.up_proj/ov_ext::linear/MatMul`, …
    """
    found = re.match(r"__module\.([^/]+)/", name)
    return found[1] if found else None


def find_factor(linear: Linear) -> ov.Input | None:
    """Return where a product takes what a layer's output is multiplied by, if that goes nowhere else."""
    readers = list(linear.node.output(0).get_target_inputs())
    product = readers[0].get_node() if len(readers) == 1 else None
    if product is None or product.get_type_name() != "Multiply":
        return None
    return product.input(1 - readers[0].get_index())


@dataclass(frozen=True)
class LayerBias:
    """
    A constant that is added to a layer's output, and to nothing else.

    :param values: One for each output channel, f32 [outputs].
    :param end: What the addition gives.
    """

    values: np.ndarray
    end: ov.Output


def find_bias(linear: Linear) -> LayerBias | None:
    """Return the constant that a layer's output goes into a sum with, if it goes nowhere else."""
    readers = list(linear.node.output(0).get_target_inputs())
    node = readers[0].get_node() if len(readers) == 1 else None
    if node is None or node.get_type_name() != "Add":
        return None
    constant = find_constant(node.input_value(1 - readers[0].get_index()))
    is_wider = node.get_output_partial_shape(0) != linear.node.get_output_partial_shape(0)
    if constant is None or is_wider or list(constant.get_output_shape(0)) != _row(constant, linear.out_features):
        return None
    return LayerBias(np.array(constant.data, np.float32).reshape(-1), node.output(0))


def _row(constant: ov.Node, length: int) -> list[int]:
    return [1] * (len(constant.get_output_shape(0)) - 1) + [length]


def find_weight_constant(output: ov.Output) -> ov.Node | None:
    """Return the constant that `output` is computed from by decompression alone, or None."""
    node = output.get_node()
    while node.get_type_name() in DECOMPRESSION:
        if any(find_constant(node.input_value(i)) is None for i in range(1, node.get_input_size())):
            return None
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def find_constant(output: ov.Output) -> ov.Node | None:
    """Return the constant behind nothing but conversions, or None."""
    node = output.get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def find_linears(model: ov.Model) -> Iterator[Linear]:
    """Yield the Linear layers of a model, in topological order."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or LOW_RANK in node.get_friendly_name():
            continue
        constants = [find_weight_constant(node.input_value(i)) for i in (0, 1)]
        # Two constants make a constant; none make attention's products.
        for port, other in ((0, constants[1]), (1, constants[0])):
            if constants[port] is None and other is not None and len(node.input_value(1 - port).get_shape()) == 2:
                yield Linear(node, port, other)


def find_head(model: ov.Model) -> Linear | None:
    """Return the layer that a result is computed from element by element, if there is one, and only one."""
    linears = {linear.node.get_name(): linear for linear in find_linears(model)}
    heads = {}
    for result in model.get_results():
        node = result.input_value(0).get_node()
        while node.get_type_name() in AFTER_HEAD:
            node = node.input_value(0).get_node()
        if node.get_name() in linears:
            heads[node.get_name()] = linears[node.get_name()]
    return next(iter(heads.values())) if len(heads) == 1 else None
