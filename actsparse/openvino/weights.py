"""Read weights: as they are stored, integers, scales and zero points, or decompressed."""

from dataclasses import dataclass

import numpy as np
import openvino as ov

from actsparse.errors import ActsparseError
from actsparse.openvino.linear import DECOMPRESSION, Linear, find_constant

INTEGERS = {"u8", "i8", "u4", "i4"}
FLOATS = {"f16", "bf16", "f32"}


class UnsupportedWeightsError(ActsparseError):
    """The kernel has no form for these weights."""


@dataclass(frozen=True)
class Weights:
    """Weights of one layer: `(values - zero) * scale`, or plain values.

    :param type: u8, u4, f16 or bf16. Signed integers are moved up to unsigned ones, and their zero point with them.
    :param values: uint8 (u4: one value in each byte) or 16-bit patterns, [out_features, in_features].
    :param scale: [out_features, groups], or None for floating point values.
    :param zero: As scale.
    """

    type: str
    values: np.ndarray
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None

    @property
    def group_size(self) -> int:
        """How many input channels share a scale."""
        in_features = self.values.shape[1]
        return in_features if self.scale is None else in_features // self.scale.shape[1]


def read_weights(linear: Linear) -> Weights:
    """Read a layer's weights.

    :param linear: A layer of an OpenVINO model.
    :raises UnsupportedWeightsError: If they are not u8, i8 per channel, u4, i4 by groups, f16, bf16 or f32.
    """
    type_name = linear.constant.get_output_element_type(0).get_type_name()
    if type_name in FLOATS:
        return _float_weights(linear, type_name)
    if type_name not in INTEGERS:
        message = f"{linear.name} has {type_name} weights; the kernel takes {', '.join(sorted(INTEGERS | FLOATS))}"
        raise UnsupportedWeightsError(message)
    return _integer_weights(linear, type_name)


def dequantise(output: ov.Output) -> np.ndarray:
    """
    Compute what constants alone decide, such as a compressed weight, in f32 throughout, as the plugin does at f32.

    :param output: The output of a constant, or of its decompression.
    :return: The values; a copy.
    :raises UnsupportedWeightsError: If anything else than a decompression is computed.
    """
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "Constant":
        return np.array(node.get_data(dtype=np.float32))  # pyright: ignore[reportAttributeAccessIssue]
    if kind not in DECOMPRESSION:
        message = f"{node.get_friendly_name()} computes its weights with {kind}, which is no decompression"
        raise UnsupportedWeightsError(message)
    values = dequantise(node.input_value(0))
    if kind == "Convert":
        return values
    if kind == "Reshape":
        return values.reshape(list(output.get_shape()))
    other = dequantise(node.input_value(1))
    if kind == "Transpose":
        return np.ascontiguousarray(values.transpose(other.astype(int).tolist()))
    return values * other if kind == "Multiply" else values - other


def _float_weights(linear: Linear, type_name: str) -> Weights:
    node = linear.node.input_value(linear.weight_port).get_node()
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        message = f"{linear.name} computes its weights with {node.get_type_name()}"
        raise UnsupportedWeightsError(message)
    values = np.asarray(linear.constant.data)
    if type_name == "bf16":
        # numpy has no such type: OpenVINO hands out the bits as f16.
        return Weights("bf16", _out_in(linear, values.view(np.uint16)))
    if type_name == "f32":
        halves = values.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), values):
            message = f"{linear.name} has f32 weights, which the kernel would round to f16: compress them first"
            raise UnsupportedWeightsError(message)
        values = halves
    return Weights("f16", _out_in(linear, values.view(np.uint16)))


def _integer_weights(linear: Linear, type_name: str) -> Weights:
    # Walk back from the MatMul to the constant: Convert, Reshape, Multiply by the scale, Subtract the zero point.
    node, scale, zero = linear.node.input_value(linear.weight_port).get_node(), None, None
    while node.get_type_name() != "Constant":
        kind = node.get_type_name()
        other = find_constant(node.input_value(1)) if kind in {"Multiply", "Subtract"} else None
        if kind == "Multiply" and scale is None and zero is None:
            scale = other
        elif kind == "Subtract" and zero is None:
            zero = other
        elif kind not in {"Convert", "Reshape"}:
            message = f"{linear.name} decompresses its weights with an unexpected {kind}"
            raise UnsupportedWeightsError(message)
        node = node.input_value(0).get_node()
    if scale is None:
        message = f"{linear.name} has integer weights without a scale"
        raise UnsupportedWeightsError(message)
    values = _unpacked(linear.constant, type_name)
    scales = np.asarray(scale.data)
    signed_offset = {"i8": 128, "i4": 8}.get(type_name, 0)
    if zero is None:
        zeros = np.full(scales.shape, signed_offset, np.int16)
    else:
        zeros = _unpacked(zero, zero.get_output_element_type(0).get_type_name()).astype(np.int16) + signed_offset
        zeros = np.broadcast_to(zeros, scales.shape)
    values = (values.astype(np.int16) + signed_offset).astype(np.uint8)
    out_features, in_features = linear.out_features, linear.in_features
    if not linear.is_weight_transposed:
        # [in, out], or [groups, group_size, out]
        values = np.moveaxis(values, -1, 0)
        scales, zeros = np.moveaxis(scales, -1, 0), np.moveaxis(zeros, -1, 0)
    if values.size != out_features * in_features or scales.size % out_features:
        message = f"{linear.name} has scales of shape {list(scales.shape)} for weights {list(values.shape)}"
        raise UnsupportedWeightsError(message)
    values = np.ascontiguousarray(values).reshape(out_features, in_features)
    scales, zeros = scales.reshape(out_features, -1), zeros.reshape(out_features, -1)
    if in_features % scales.shape[1]:
        message = f"{linear.name} has {scales.shape[1]} groups for {in_features} input channels"
        raise UnsupportedWeightsError(message)
    wide = type_name in {"u8", "i8"}
    if wide and scales.shape[1] != 1:
        message = f"{linear.name} has INT8 weights by groups; the kernel takes one scale for each output"
        raise UnsupportedWeightsError(message)
    return Weights("u8" if wide else "u4", values, scales, zeros)


def _unpacked(constant: ov.Node, type_name: str) -> np.ndarray:
    """Return a constant's integers, one in each byte."""
    shape = list(constant.get_output_shape(0))
    if type_name in {"u8", "i8"}:
        return np.asarray(constant.data)
    if type_name not in {"u4", "i4"}:
        message = f"{constant.get_friendly_name()} is {type_name}, not an integer of 4 or 8 bits"
        raise UnsupportedWeightsError(message)
    packed = np.asarray(constant.data)
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: int(np.prod(shape))].reshape(shape)
    # Two's complement of four bits.
    return values if type_name == "u4" else np.where(values > 7, values.astype(np.int8) - 16, values).astype(np.int8)


def _out_in(linear: Linear, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values if linear.is_weight_transposed else values.T)
