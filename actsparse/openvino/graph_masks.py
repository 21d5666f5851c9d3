"""Masks in an OpenVINO model: Abs, LessEqual and Select in front of Linear layers, or of what their outputs meet."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from actsparse.errors import ActsparseError
from actsparse.mask import NO_COMPENSATION, Compensation
from actsparse.openvino.compensations import (
    add_bias,
    biased,
    fill_outputs,
    read_compensation,
    remove_fillings,
    shift_source,
    unbiased,
    unshifted,
)
from actsparse.openvino.linear import Linear, find_constant, find_factor, find_linears


@dataclass(frozen=True)
class GraphMask:
    """
    One mask, and the layers whose weights it makes useless.

    :param threshold: |x| <= threshold becomes 0; shape [] or [channels].
    :param linears: The Linear layers behind it; for a mask of rows the one whose output it meets in a product.
    :param tokens: `all`, or `decode` for a mask that lets everything pass but the runs of one token.
    :param is_of_rows: Whether zeros make rows of the weights useless, and not input channels.
    :param compensation: What compensates for what is left out; with a shift, `source` is what that is
        subtracted from.
    """

    select: ov.Node
    source: ov.Output
    threshold: np.ndarray
    linears: tuple[Linear, ...]
    tokens: str = "all"
    is_of_rows: bool = False
    compensation: Compensation = NO_COMPENSATION

    @property
    def channels(self) -> int:
        """How many channels the masked tensor has."""
        return self.linears[0].out_features if self.is_of_rows else self.linears[0].in_features


def find_masks(model: ov.Model) -> list[GraphMask]:
    """List the masks of a model, in topological order.

    :param model: An OpenVINO model, sparsified there or converted from a sparsified torch model.
    :return: Every `Select(LessEqual(Abs(x), threshold), 0, x)` that a Linear layer reads, or that is multiplied by a
        Linear layer's output and by nothing else.
    """
    readers: dict[str, list[Linear]] = {}
    by_node: dict[str, Linear] = {}
    for linear in find_linears(model):
        readers.setdefault(unbiased(linear.source).get_node().get_name(), []).append(linear)
        by_node[linear.node.get_name()] = linear
    masks = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Select":
            continue
        linears = tuple(readers.get(node.get_name(), ()))
        multiplied = None if linears else _multiplied_layer(node, by_node)
        found = _read_mask(node) if linears or multiplied else None
        if found:
            source, threshold, tokens = found
            compensation = read_compensation(node, source)
            behind: Any = linears or (multiplied,)
            masks.append(GraphMask(node, source, threshold, behind, tokens, not linears, compensation))
    return masks


def count_masks(model: ov.Model) -> int:
    """Return how many masks a model has."""
    return len(find_masks(model))


def insert_mask(
    linears: list[Linear],
    threshold: np.ndarray | float,
    tokens: str = "all",
    compensation: Compensation = NO_COMPENSATION,
) -> GraphMask:
    """
    Mask the input of layers that read the same output.

    :param tokens: `all` masks every token, `decode` only runs of a single new token.
    """
    source = shift_source(linears[0].source, compensation, linears[0].name)
    select, bound = _make_mask(source, threshold, tokens)
    select.set_friendly_name(f"{linears[0].name}/activation_sparsifier")
    is_masked = _is_one_token(source) if tokens == "decode" else None
    output = add_bias(select, compensation, linears[0].name, is_masked)
    for linear in linears:
        linear.node.input(linear.input_port).replace_source_output(output)
    fill_outputs(linears, select, source, compensation)
    return GraphMask(select, source, bound, tuple(linears), tokens, compensation=compensation)


def insert_row_mask(linear: Linear, threshold: np.ndarray | float, tokens: str = "all") -> GraphMask:
    """Mask what a layer's output is multiplied by, an activation function's output.

    :param linear: The layer, whose rows become useless where the mask leaves zeros.
    :param threshold: A number, or one for each of the layer's outputs.
    :param tokens: `all` masks every token, `decode` only runs of a single new token.
    :return: The new mask.
    :raises ActsparseError: If the output goes anywhere but into one product.
    """
    factor = find_factor(linear)
    if factor is None:
        msg = f"the output of {linear.name} is not multiplied by an activation function's, whose mask it shall have"
        raise ActsparseError(msg)
    source = factor.get_source_output()
    select, bound = _make_mask(source, threshold, tokens)
    select.set_friendly_name(f"{source.get_node().get_friendly_name()}/activation_sparsifier")
    factor.replace_source_output(select.output(0))
    return GraphMask(select, source, bound, (linear,), tokens, is_of_rows=True)


def _make_mask(source: ov.Output, threshold: np.ndarray | float, tokens: str) -> tuple[ov.Node, np.ndarray]:
    bound = np.asarray(threshold, np.float32)
    kind = source.get_element_type()
    # Thresholds stay f32: rounding them to the activations' type could let an entry pass that torch masks.
    magnitude = ops.absolute(source)
    if kind != ov.Type.f32:
        magnitude = ops.convert(magnitude, ov.Type.f32)
    limit = ops.constant(bound, dtype=np.float32)
    if tokens == "decode":
        limit = ops.select(_is_one_token(source), limit, ops.constant(-np.inf, dtype=np.float32))
    is_small = ops.less_equal(magnitude, limit)
    return ops.select(is_small, ops.constant(np.zeros([], np.float32), dtype=kind), source), bound


def _multiplied_layer(node: ov.Node, by_node: dict[str, Linear]) -> Linear | None:
    """Return the layer that a node's output is multiplied by, if it is used for nothing else."""
    readers = list(node.output(0).get_target_inputs())
    product = readers[0].get_node() if len(readers) == 1 else None
    if product is None or product.get_type_name() != "Multiply":
        return None
    return by_node.get(product.input_value(1 - readers[0].get_index()).get_node().get_name())


def remove_masks(model: ov.Model) -> int:
    """Remove every mask in place."""
    masks = find_masks(model)
    for mask in masks:
        source = unshifted(mask.source)
        for linear in mask.linears:
            remove_fillings(linear)
        for output in (biased(mask.select), mask.select.output(0)):
            for reader in list(output.get_target_inputs()):
                reader.replace_source_output(source)
    return len(masks)


def group_by_source(linears: Iterator[Linear] | list[Linear]) -> list[list[Linear]]:
    """Group layers by the output that they read, in the order of their first one."""
    groups: dict[tuple[str, int], list[Linear]] = {}
    for linear in linears:
        source = linear.source
        groups.setdefault((source.get_node().get_name(), source.get_index()), []).append(linear)
    return list(groups.values())


def _is_one_token(source: ov.Output) -> ov.Node:
    # [..., tokens, channels]
    length = ops.gather(ops.shape_of(source), ops.constant(-2, dtype=np.int64), ops.constant(0, dtype=np.int64))
    return ops.equal(length, ops.constant(1, dtype=np.int64))


def require_sequences(model: ov.Model) -> None:
    """
    Keep decode masks of a language model out of graphs that cannot tell prompts from single tokens.

    OpenVINO's transformation to PagedAttention lays all tokens out as sequences of one token. It also takes the
    attention mask away: what needs it is refused there. Without this, prompts would be masked.

    :param model: A masked model; changed in place, once.
    """
    attention_mask = next((port for port in model.inputs if "attention_mask" in port.get_names()), None)
    if attention_mask is None:
        return
    zero = ops.constant(0, dtype=np.int64)
    has_sequences = ops.greater_equal(ops.gather(ops.shape_of(attention_mask), zero, zero), zero)
    has_sequences.set_friendly_name("actsparse: tokens='decode' needs sequences, which PagedAttention does not have")
    for mask in find_masks(model):
        if mask.tokens != "decode":
            continue
        limit = mask.select.input_value(0).get_node().input_value(1)
        condition = limit.get_node().input(0)
        if condition.get_source_output().get_node().get_type_name() == "Equal":
            both = ops.logical_and(condition.get_source_output(), has_sequences)
            condition.replace_source_output(both.output(0))


def _tells_one_token(output: ov.Output, source: ov.Output) -> bool:
    equal = output.get_node()
    if equal.get_type_name() == "LogicalAnd":
        equal = equal.input_value(0).get_node()
    gather = equal.input_value(0).get_node() if equal.get_type_name() == "Equal" else None
    shape = gather.input_value(0).get_node() if gather and gather.get_type_name() == "Gather" else None
    if gather is None or shape is None or shape.get_type_name() != "ShapeOf" or shape.input_value(0) != source:
        return False
    return _is_constant(gather.input_value(1), -2) and _is_constant(equal.input_value(1), 1)


def _is_constant(output: ov.Output, value: float) -> bool:
    constant = find_constant(output)
    return constant is not None and np.array(constant.data).tolist() == value


def _read_mask(node: ov.Node) -> tuple[ov.Output, np.ndarray, str] | None:
    """Return what a Select masks, its threshold and its tokens, or None if it is not a mask."""
    if node.get_type_name() != "Select":
        return None
    condition, zero, source = (node.input_value(i) for i in range(3))
    compare = condition.get_node()
    if compare.get_type_name() != "LessEqual":
        return None
    magnitude = compare.input_value(0).get_node()
    while magnitude.get_type_name() == "Convert":
        magnitude = magnitude.input_value(0).get_node()
    limit, tokens = compare.input_value(1), "all"
    if limit.get_node().get_type_name() == "Select":
        is_one, limit, otherwise = (limit.get_node().input_value(i) for i in range(3))
        if not _tells_one_token(is_one, source) or not _is_constant(otherwise, -np.inf):
            return None
        tokens = "decode"
    bound, zero_constant = find_constant(limit), find_constant(zero)
    if magnitude.get_type_name() != "Abs" or bound is None or zero_constant is None:
        return None
    if magnitude.input_value(0) != source or np.any(np.asarray(zero_constant.data)):
        return None
    threshold = np.array(bound.data, np.float32)
    return source, threshold.reshape(-1) if threshold.size > 1 else threshold.reshape([]), tokens
