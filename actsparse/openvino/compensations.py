"""What compensates for masked entries in an OpenVINO model: a shift before, a bias, additions behind layers."""

from collections.abc import Sequence

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch

from actsparse.mask import Compensation
from actsparse.openvino.linear import LOW_RANK, Linear, find_constant

# What the nodes are called behind the name of their site or layer: that is how they are found again.
SHIFTED = "/shifted"
LEFT_OUT = "/left_out"
BIASED = "/biased"
FILLED = "/filled"


def shift_source(source: ov.Output, compensation: Compensation, name: str) -> ov.Output:
    """Subtract the shift before the mask."""
    if compensation.shift is None:
        return source
    node = ops.subtract(source, ops.constant(compensation.shift.numpy(), dtype=source.get_element_type()))
    node.set_friendly_name(name + SHIFTED)
    return node.output(0)


def add_bias(select: ov.Node, compensation: Compensation, name: str, is_masked: ov.Node | None) -> ov.Output:
    """
    Add the bias to what a mask lets pass: so the model still tells it, and `accelerate` makes it one of the layers.

    :param is_masked: Whether the run at hand is masked, where not all are.
    """
    if compensation.bias is None:
        return select.output(0)
    bias = ops.constant(compensation.bias.numpy(), dtype=select.get_output_element_type(0))
    if is_masked is not None:
        bias = ops.select(is_masked, bias, ops.constant(0, dtype=bias.get_output_element_type(0)))
    node = ops.add(select, bias)
    node.set_friendly_name(name + BIASED)
    return node.output(0)


def unbiased(source: ov.Output) -> ov.Output:
    """
    Find out what a layer would read without a bias.

    :return: What the bias is added to; the same where there is none.
    """
    return source.get_node().input_value(0) if _is_biased(source) else source


def biased(select: ov.Node) -> ov.Output:
    """
    Find out what the layers behind a mask read.

    :return: Where the bias is added; the same where there is none.
    """
    readers = (reader.get_node().output(0) for reader in select.output(0).get_target_inputs())
    return next(filter(_is_biased, readers), select.output(0))


def fill_outputs(linears: list[Linear], select: ov.Node, source: ov.Output, compensation: Compensation) -> None:
    """
    Add to the outputs of layers what their weights make of the compensation.

    W (kept + V Vᵀ left out + m) = W kept + (W V) Vᵀ left out + W m, of which the layers themselves compute the first.
    """
    if compensation.shift is None and compensation.basis is None:
        return
    kind = source.get_element_type()
    inner = None
    if compensation.basis is not None:
        left_out = ops.subtract(source, select)
        left_out.set_friendly_name(linears[0].name + LEFT_OUT)
        vectors = ops.convert(ops.constant(compensation.basis.numpy().astype(np.float16)), kind)
        inner = ops.matmul(left_out, vectors, False, False)
        inner.set_friendly_name(f"{linears[0].name}{LOW_RANK}in")
    rows = [] if compensation.basis is None else [compensation.basis.numpy().T]
    if compensation.shift is not None:
        rows.append(np.full((1, linears[0].in_features), float(compensation.shift), np.float32))
    products = multiply_weights(linears, rows)
    for linear in linears:
        readers = list(linear.node.output(0).get_target_inputs())
        filled = linear.node
        if inner is not None:
            outer = ops.matmul(inner, ops.convert(ops.constant(products.pop(0).astype(np.float16)), kind), False, False)
            outer.set_friendly_name(f"{linear.name}{LOW_RANK}out")
            filled = ops.add(filled, outer)
            filled.set_friendly_name(linear.name + FILLED)
        if compensation.shift is not None:
            filled = ops.add(filled, ops.constant(products.pop(0).reshape(-1), dtype=kind))
            filled.set_friendly_name(linear.name + FILLED)
        for reader in readers:
            reader.replace_source_output(filled.output(0))


def unshifted(source: ov.Output) -> ov.Output:
    """
    Find out what a mask would read without a shift.

    :return: What the shift is subtracted from; the same where there is none.
    """
    return source.get_node().input_value(0) if _is_shifted(source) else source


def read_compensation(select: ov.Node, source: ov.Output) -> Compensation:
    """Find out what compensates for what a mask leaves out."""
    shift = basis = bias = None
    if _is_shifted(source):
        shift = torch.tensor(float(_read_constant(source.get_node().input_value(1))))
    output = biased(select)
    if output != select.output(0):
        added = output.get_node().input_value(1)
        is_chosen = added.get_node().get_type_name() == "Select"  # by the length of the run
        bias = torch.from_numpy(_read_constant(added.get_node().input_value(1) if is_chosen else added))
    for reader in select.output(0).get_target_inputs():
        if reader.get_node().get_friendly_name().endswith(LEFT_OUT):
            (inner,) = reader.get_node().output(0).get_target_inputs()
            basis = torch.from_numpy(_read_constant(inner.get_node().input_value(1)))
    return Compensation(shift, basis, bias)


def _is_shifted(source: ov.Output) -> bool:
    return source.get_node().get_friendly_name().endswith(SHIFTED)


def _is_biased(source: ov.Output) -> bool:
    return source.get_node().get_friendly_name().endswith(BIASED)


def _read_constant(output: ov.Output) -> np.ndarray:
    constant = find_constant(output)
    if constant is not None:
        return np.array(constant.data, np.float32)
    # A model may have been compressed since: its weights are computed.
    return _evaluate([ops.convert(output, ov.Type.f32)])[0]


def remove_fillings(linear: Linear) -> None:
    """Take off what was added behind a layer."""
    filled = output = linear.node.output(0)
    while (after := _next_addition(filled, linear.name)) is not None:
        filled = after
    if filled != output:
        for reader in list(filled.get_target_inputs()):
            reader.replace_source_output(output)


def _next_addition(output: ov.Output, name: str) -> ov.Output | None:
    for reader in output.get_target_inputs():
        node = reader.get_node()
        if node.get_type_name() == "Add" and node.get_friendly_name().startswith(name + FILLED):
            return node.output(0)
    return None


def multiply_weights(linears: Sequence[Linear], vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """
    Multiply layers' weights, as they are stored.

    :param vectors: Vectors of input channels, [vectors, inputs] each.
    :return: For each layer in turn its product with each of them, [vectors, outputs].
    """
    products = []
    for linear in linears:
        weight = ops.convert(linear.node.input_value(linear.weight_port), ov.Type.f32)
        for rows in vectors:
            constant = ops.constant(np.ascontiguousarray(rows, np.float32))
            products.append(ops.matmul(constant, weight, False, linear.is_weight_transposed))
    return _evaluate(products)


def _evaluate(nodes: list[ov.Node]) -> list[np.ndarray]:
    """Compute what depends on constants alone."""
    model = ov.Model([ops.result(node) for node in nodes], [], "constants")  # pyright: ignore[reportGeneralTypeIssues]
    found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
    return [np.array(found[i]) for i in range(len(nodes))]
