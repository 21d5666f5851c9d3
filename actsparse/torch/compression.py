"""Weights compressed by NNCF, quietly: its tables and progress bars are not this program's output."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

import nncf
from nncf.common.logging import nncf_logger
from torch import nn

from actsparse.errors import ActsparseError, nearest, shorten_message
from actsparse.torch.experts import split_experts
from actsparse.torch.offload import require_weights

Model = TypeVar("Model")

INT8_MODES = ("asym", "sym")
WEIGHT_MODES = {
    "int8_asym": nncf.CompressWeightsMode.INT8_ASYM,
    "int8_sym": nncf.CompressWeightsMode.INT8_SYM,
    "int4_asym": nncf.CompressWeightsMode.INT4_ASYM,
    "int4_sym": nncf.CompressWeightsMode.INT4_SYM,
}
# What `nncf.compress_weights` raises at a model, or at options, that it cannot take.
NNCF_ERRORS = (
    nncf.InternalError,
    nncf.InvalidGroupSizeError,
    nncf.ParameterNotSupportedError,
    nncf.UnsupportedModelError,
    nncf.ValidationError,
)


def compress_int8(model: nn.Module, mode: str, example_input: Any) -> nn.Module:
    """
    Compress a model's weights to INT8 with `nncf.compress_weights`.

    :param model: The model, masked or not; changed in place.
    :param mode: ``asym`` or ``sym``.
    :param example_input: One model input, for NNCF to trace the model with.
    :raises ActsparseError: If there is no such mode, weights are offloaded, or NNCF cannot compress them.
    """
    if mode not in INT8_MODES:
        msg = f"unknown INT8 mode {mode!r}; nearest: {nearest(mode, INT8_MODES)}"
        raise ActsparseError(msg)
    return compress_weights(model, f"int8_{mode}", example_input)


def compress_weights(model: Model, weights: str, example_input: Any = None, *, group_size: int = 128) -> Model:
    """
    Compress all of a model's weights to INT8, or to INT4 by groups, with `nncf.compress_weights`.

    :param model: A torch model, masked or not, or an `openvino.Model`; changed in place.
    :param weights: A name of `WEIGHT_MODES`.
    :param example_input: One model input, for NNCF to trace a torch model with.
    :param group_size: Input channels in a group of INT4 weights; layers that it does not divide get smaller groups.
    :raises ActsparseError: If weights are offloaded, or NNCF cannot compress them.
    """
    require_weights(model, "compressing weights")
    if isinstance(model, nn.Module):
        # NNCF leaves what experts have together alone.
        split_experts(model)
    options: dict[str, Any] = {"mode": WEIGHT_MODES[weights]}
    if weights.startswith("int4"):
        fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        options |= {"group_size": group_size, "ratio": 1.0, "advanced_parameters": fallback}
    if example_input is not None:
        options["dataset"] = nncf.Dataset([example_input])
    try:
        with quiet_nncf():
            return nncf.compress_weights(model, **options)
    except NNCF_ERRORS as error:
        msg = f"nncf cannot compress the weights to {weights}: {shorten_message(error)}"
        raise ActsparseError(msg) from error


@contextmanager
def quiet_nncf() -> Iterator[None]:
    """Keep NNCF from logging and printing."""
    level = nncf_logger.level
    nncf_logger.setLevel(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        nncf_logger.setLevel(level)
