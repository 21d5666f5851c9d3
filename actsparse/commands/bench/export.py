"""Export a torch model to OpenVINO by optimum-intel, and compress its weights by NNCF, quietly."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
from transformers import PreTrainedModel

from actsparse.errors import ActsparseError, shorten_message
from actsparse.models.quiet import quiet_libraries
from actsparse.openvino.folder import MODEL_FILE
from actsparse.torch.compression import quiet_nncf

# What `nncf.compress_weights` is asked for; f16 leaves the weights as they are.
WEIGHTS: dict[str, dict[str, Any]] = {
    "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
    "int4": {
        "mode": nncf.CompressWeightsMode.INT4_ASYM,
        "group_size": 128,
        "ratio": 1.0,
        # Layers whose inputs are no multiple of 128 get smaller groups.
        "advanced_parameters": nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        ),
    },
    "f16": {},
}
# Bytes of each weight, scales and INT8 layers of INT4 models included.
WEIGHT_BYTES = {"int8": 1.05, "int4": 0.65, "f16": 2.0}


def export_f16(model: PreTrainedModel, weights: str, folder: Path) -> Path:
    """
    Export a model in fp16 as it is.

    :param model: The torch model in fp16; what optimum-intel patches in it does not matter afterwards.
    :param weights: What the weights will be compressed to, which runtime options depend on.
    :param folder: Where to write.
    :return: The model's XML file.
    :raises ActsparseError: If optimum-intel cannot export it.
    """
    from optimum.exporters.openvino.convert import export_from_model
    from optimum.intel.openvino.configuration import OVConfig, OVWeightQuantizationConfig

    config = OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8)) if WEIGHTS[weights] else None
    try:
        with _quiet():
            export_from_model(model, folder, task="text-generation-with-past", ov_config=config, patch_16bit_model=True)
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        msg = f"optimum-intel cannot export this {type(model).__name__}: {shorten_message(error)}"
        raise ActsparseError(msg) from error
    return folder / MODEL_FILE


def compress_weights(source: Path, weights: str, target: Path) -> None:
    """
    Compress the weights of an exported model.

    :param source: Its XML file.
    :param weights: A name of `WEIGHTS` that compresses.
    :param target: The XML file to write.
    :raises ActsparseError: If NNCF cannot compress them.
    """
    model = ov.Core().read_model(source)
    try:
        with _quiet():
            compressed = nncf.compress_weights(model, **WEIGHTS[weights])
    except (nncf.InternalError, nncf.InvalidGroupSizeError, nncf.UnsupportedModelError) as error:
        msg = f"nncf cannot compress the weights to {weights}: {shorten_message(error)}"
        raise ActsparseError(msg) from error
    ov.save_model(compressed, target, compress_to_fp16=False)


@contextmanager
def _quiet() -> Iterator[None]:
    with quiet_nncf(), quiet_libraries(), warnings.catch_warnings():
        # The tracer warns of every Python condition in a model.
        warnings.simplefilter("ignore")
        yield
