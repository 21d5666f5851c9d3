"""Compress an OpenVINO model's weights to INT4 with what NNCF learns from data: AWQ, scale estimation, GPTQ."""

from collections.abc import Iterable
from typing import Any

import nncf
import openvino as ov

from actsparse.calibration import describe_batch
from actsparse.errors import ActsparseError, DatasetError, shorten_message
from actsparse.openvino.inputs import make_inputs
from actsparse.torch.compression import NNCF_ERRORS, quiet_nncf


def compress_int4_aware(
    model: ov.Model,
    dataset: Iterable[Any],
    *,
    group_size: int = 64,
    is_symmetric: bool = False,
    awq: bool = True,
    scale_estimation: bool = True,
    gptq: bool = False,
) -> ov.Model:
    """
    Compress all of a model's weights to INT4 by groups, as data tells; the embedding and the head to INT8.

    :param model: An `openvino.Model`, not compressed; changed in place.
    :param dataset: Calibration data, all of it used: batches for a language model need `input_ids` alone.
    :param group_size: Input channels in a group; layers that it does not divide get smaller groups.
    :param is_symmetric: Whether to leave zero points out.
    :param awq: Whether to scale channels that matter (AWQ), before anything else.
    :param scale_estimation: Whether to choose scales that keep what layers compute.
    :param gptq: Whether to let the weights that are still to be rounded make up for those that are (GPTQ).
    :return: The model.
    :raises DatasetError: If there is no data, or it does not fit the model.
    :raises ActsparseError: If nothing is to be learnt from it, or NNCF cannot compress the weights.
    """
    if not (awq or scale_estimation or gptq):
        msg = "awq, scale_estimation and gptq are all off: nothing is left to learn from data; use compress_weights"
        raise ActsparseError(msg)
    batches = [_complete(model, batch, number) for number, batch in enumerate(dataset)]
    if not batches:
        msg = "the dataset to compress weights with is empty"
        raise DatasetError(msg)
    mode = nncf.CompressWeightsMode.INT4_SYM if is_symmetric else nncf.CompressWeightsMode.INT4_ASYM
    fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    try:
        with quiet_nncf():
            return nncf.compress_weights(
                model,
                mode=mode,
                group_size=group_size,
                ratio=1.0,
                dataset=nncf.Dataset(batches),
                subset_size=len(batches),
                advanced_parameters=fallback,
                awq=awq,
                scale_estimation=scale_estimation,
                gptq=gptq,
            )
    except NNCF_ERRORS as error:
        msg = f"nncf cannot compress the weights to INT4 with data: {shorten_message(error)}"
        raise ActsparseError(msg) from error


def _complete(model: ov.Model, batch: Any, number: int) -> dict[str, Any]:
    """Make every input of a stateful language model, which NNCF runs as it is."""
    try:
        return make_inputs(model, batch)
    except ActsparseError as error:
        msg = f"the model cannot take batch {number} of the dataset ({describe_batch(batch)}): {error}"
        raise DatasetError(msg) from None
