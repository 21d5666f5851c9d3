"""What compensates for masked entries in an OpenVINO model: a shift before the mask, additions behind the layers."""

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch

from actsparse.mask import NO_COMPENSATION, Compensation
from actsparse.openvino.linear import LOW_RANK, Linear, find_constant

# What the nodes are called behind the name of their site or layer: that is how they are found again.
SHIFTED = "/shifted"
LEFT_OUT = "/left_out"
FILLED = "/filled"


def shift_source(source: ov.Output, compensation: Compensation, name: str) -> ov.Output:
    """Subtract the shift before the mask."""
    if compensation.shift is None:
        return source
    node = ops.subtract(source, ops.constant(compensation.shift.numpy(), dtype=source.get_element_type()))
    node.set_friendly_name(name + SHIFTED)
    return node.output(0)


def fill_outputs(linears: list[Linear], select: ov.Node, source: ov.Output, compensation: Compensation) -> None:
    """
    Add to the outputs of layers what their weights make of the compensation.

    W (kept + V Vᵀ left out + m) = W kept + (W V) Vᵀ left out + W m, of which the layers themselves compute the first.
    """
    if compensation == NO_COMPENSATION:
        return
    kind = source.get_element_type()
    inner = None
    if compensation.basis is not None:
        left_out = ops.subtract(source, select)
        left_out.set_friendly_name(linears[0].name + LEFT_OUT)
        vectors = ops.convert(ops.constant(compensation.basis.numpy().astype(np.float16)), kind)
        inner = ops.matmul(left_out, vectors, False, False)
        inner.set_friendly_name(f"{linears[0].name}{LOW_RANK}in")
    products = _multiply(linears, compensation)
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
    shift = basis = None
    if _is_shifted(source):
        shift = torch.tensor(float(_read_constant(source.get_node().input_value(1))))
    for reader in select.output(0).get_target_inputs():
        if reader.get_node().get_friendly_name().endswith(LEFT_OUT):
            (inner,) = reader.get_node().output(0).get_target_inputs()
            basis = torch.from_numpy(_read_constant(inner.get_node().input_value(1)))
    return Compensation(shift, basis)


def _is_shifted(source: ov.Output) -> bool:
    return source.get_node().get_friendly_name().endswith(SHIFTED)


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


def _multiply(linears: list[Linear], compensation: Compensation) -> list[np.ndarray]:
    """Multiply the layers' weights, as they are stored, by the basis and the shift: [rank, outputs], [1, outputs]."""
    inputs = linears[0].in_features
    columns = [] if compensation.basis is None else [compensation.basis.numpy().T]
    if compensation.shift is not None:
        columns.append(np.full((1, inputs), float(compensation.shift), np.float32))
    products = []
    for linear in linears:
        weight = ops.convert(linear.node.input_value(linear.weight_port), ov.Type.f32)
        for rows in columns:
            constant = ops.constant(np.ascontiguousarray(rows, np.float32))
            products.append(ops.matmul(constant, weight, False, linear.is_weight_transposed))
    return _evaluate(products)


def _evaluate(nodes: list[ov.Node]) -> list[np.ndarray]:
    """Compute what depends on constants alone."""
    model = ov.Model([ops.result(node) for node in nodes], [], "constants")  # pyright: ignore[reportGeneralTypeIssues]
    found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
    return [np.array(found[i]) for i in range(len(nodes))]
