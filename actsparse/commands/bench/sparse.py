"""Sparsify and accelerate an OpenVINO model, and count what its masks zero in decoding."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from actsparse.algorithms import ZEROS
from actsparse.commands.bench.decoder import Decoder, make_settings
from actsparse.errors import ActsparseError
from actsparse.openvino.acceleration import Acceleration, accelerate
from actsparse.openvino.graph_masks import find_masks
from actsparse.openvino.linear import find_linears
from actsparse.sparsify import sparsify_activations
from actsparse.thresholds import load_thresholds


@dataclass(frozen=True)
class SparseModel:
    """A masked model in two forms."""

    xml: Path
    portable: ov.Model
    acceleration: Acceleration


@dataclass(frozen=True)
class Reads:
    """
    What masks zero, and what that saves of the weights.

    :param measured_sparsity: Share of zeros over masked layers, weighted by weight bytes.
    :param weight_reads_skipped: Share of all Linear weights' bytes, the head's included, that the kernel need not read.
    :param accelerated_share: Share of all Linear weights' bytes in layers that the kernel runs.
    """

    measured_sparsity: float
    weight_reads_skipped: float
    accelerated_share: float


def make_sparse(
    core: ov.Core, dense: Path, batches: list[Any], targets: Any, *, is_exact: bool, target: Path
) -> SparseModel:
    """
    Sparsify a dense model, accelerate it, and save it.

    :param targets: As for `sparsify_activations`, or a thresholds file; or `ZEROS`, for what is zero by itself.
    :param is_exact: Whether the kernel keeps 24 bits of activations.
    :raises ActsparseError: If the targets do not fit the model, or the kernel runs none of its masks.
    """
    model = core.read_model(dense)
    if isinstance(targets, Path):
        load_thresholds(model, targets)
    elif targets == ZEROS:
        sparsify_activations(model, algorithm=ZEROS)
    else:
        sparsify_activations(model, batches, targets)
    portable = model.clone()
    acceleration = accelerate(model, exact=is_exact)
    if not acceleration.masked:
        reasons = sorted({site.reason for site in acceleration.kept})
        msg = f"the kernel runs none of the masked layers: {reasons[0] if reasons else 'no layer has a mask'}"
        raise ActsparseError(msg)
    ov.save_model(model, target, compress_to_fp16=False)
    # Half a gigabyte written back in the middle of a measurement would slow it down.
    with target.with_suffix(".bin").open("rb") as file:
        os.fsync(file.fileno())
    return SparseModel(target, portable, acceleration)


def count_linear_bytes(core: ov.Core, xml: Path) -> int:
    """
    Sum up the weights that decoding a token reads.

    :return: Bytes of all Linear layers' weights, the head's included, without scales and zero points.
    """
    return sum(linear.weight_bytes for linear in find_linears(core.read_model(xml)))


def measure_reads(
    core: ov.Core, sparse: SparseModel, tokens: np.ndarray, *, num_prompt_tokens: int, threads: int
) -> Reads:
    """
    Count zeros behind the masks of the portable model while it decodes.

    :param tokens: [1, tokens].
    """
    model = sparse.portable.clone()
    linears = {linear.name: linear.weight_bytes for linear in find_linears(model)}
    masks = find_masks(model)
    first = len(model.outputs)
    model.add_results([ops.result(_count_zeros(mask.select)) for mask in masks])
    decoder = Decoder(core, model, make_settings("f32", threads))
    decoder.start()
    decoder.feed(tokens[:, :num_prompt_tokens])
    zeros = np.zeros(len(masks))
    for i in range(num_prompt_tokens, tokens.shape[1]):
        decoder.feed(tokens[:, i : i + 1])
        zeros += [float(decoder.output(first + n)) for n in range(len(masks))]
    run = {layer for site in sparse.acceleration.accelerated for layer in site.layers}
    masked = skipped = accelerated = zero_bytes = 0.0
    for mask, count in zip(masks, zeros, strict=True):
        share = count / (tokens.shape[1] - num_prompt_tokens) / mask.channels
        for linear in mask.linears:
            masked += linear.weight_bytes
            zero_bytes += share * linear.weight_bytes
            if linear.module_name in run:
                accelerated += linear.weight_bytes
                skipped += share * linear.weight_bytes
    total = sum(linears.values())
    return Reads(zero_bytes / masked, skipped / total, accelerated / total)


def _count_zeros(select: ov.Node) -> ov.Node:
    kind = select.get_output_element_type(0)
    is_zero = ops.equal(select, ops.constant(np.zeros([]), dtype=kind))
    axes = np.arange(select.get_output_partial_shape(0).rank.get_length())
    return ops.reduce_sum(ops.convert(is_zero, ov.Type.f32), axes)
