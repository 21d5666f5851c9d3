"""INT8 weights by NNCF, quietly: its tables and progress bars are not this program's output."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import nncf
from nncf.common.logging import nncf_logger
from torch import nn

from actsparse.errors import ActsparseError, nearest
from actsparse.offload import require_weights

INT8_MODES = {"asym": nncf.CompressWeightsMode.INT8_ASYM, "sym": nncf.CompressWeightsMode.INT8_SYM}


def compress_int8(model: nn.Module, mode: str, example_input: Any) -> nn.Module:
    """
    Compress a model's weights to INT8 with `nncf.compress_weights`.

    :param model: The model, masked or not; changed in place.
    :param mode: ``asym`` or ``sym``.
    :param example_input: One model input, for NNCF to trace the model with.
    :return: The compressed model.
    :raises ActsparseError: If there is no such mode, or weights are offloaded.
    """
    if mode not in INT8_MODES:
        msg = f"unknown INT8 mode {mode!r}; nearest: {nearest(mode, INT8_MODES)}"
        raise ActsparseError(msg)
    require_weights(model, "compressing weights")
    with quiet_nncf():
        return nncf.compress_weights(model, mode=INT8_MODES[mode], dataset=nncf.Dataset([example_input]))


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
