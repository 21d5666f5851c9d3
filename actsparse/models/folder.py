"""Models in folders: laid out as on the hub, or with an OpenVINO model."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from actsparse.errors import SourceError
from actsparse.models.explain import explain_errors
from actsparse.models.quiet import quiet_libraries
from actsparse.models.weights import load_weights
from actsparse.openvino.deploy import load_causal_lm
from actsparse.openvino.folder import MODEL_FILE
from actsparse.storage.files import kind_of

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def load_folder(
    folder: Path, name: str, dtype: torch.dtype, **placement: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a folder in the hub's layout.

    :param placement: Where weights go, as ``from_pretrained`` takes it; all to the CPU by default.
    :raises SourceError: If a file is absent or unreadable, or the model is no causal language model.
    """
    _check_folder(folder, name)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet_libraries(), explain_errors(name):
        config = AutoConfig.from_pretrained(folder, **options)
        _check_is_causal(config, name)
        _check_packages(config, name)
        tokenizer = load_tokenizer(folder, name)
        options |= {"use_safetensors": True, **placement}
        model = load_weights(folder, name, config=config, dtype=dtype, **options)
    return model, tokenizer


def is_openvino_folder(folder: Path) -> bool:
    """Tell whether a folder holds an OpenVINO model."""
    return kind_of(folder / MODEL_FILE) == "file"


def load_openvino_folder(folder: Path, name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Load a folder with an OpenVINO model, whose weights and masks stay as they are.

    :return: An `OVModelForCausalLM`, which is compiled when it first runs, and its tokenizer.
    :raises ActsparseError: If a file is absent or unreadable, or optimum-intel or the extension is missing.
    """
    return load_causal_lm(folder, compile=False), load_tokenizer(folder, name)


def load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model's folder.

    :raises SourceError: If there is none, or it is unreadable.
    """
    if not any(kind_of(folder / file) == "file" for file in _TOKENIZER_FILES):
        looked_for = ", ".join(_TOKENIZER_FILES)
        msg = f"{name} has no tokenizer (looked for {looked_for}); save one there with tokenizer.save_pretrained"
        raise SourceError(msg)
    with quiet_libraries(), explain_errors(name):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _check_folder(folder: Path, name: str) -> None:
    if kind_of(folder / "config.json") != "file":
        msg = f"{name} has no config.json, so it is no model's folder"
        raise SourceError(msg)
    if not any(kind_of(folder / file) == "file" for file in _WEIGHT_FILES):
        if is_openvino_folder(folder):
            msg = f"{name} holds an OpenVINO model, and this takes torch weights: give the model that it was made from"
            raise SourceError(msg)
        pickled = next((file.name for file in sorted(folder.glob("*.bin"))), None)
        reason = f"only pickled ones ({pickled}), which could run any code; convert them first" if pickled else "none"
        msg = f"{name} must hold weights as safetensors ({' or '.join(_WEIGHT_FILES)}) but has {reason}"
        raise SourceError(msg)


def _check_is_causal(config: PretrainedConfig, name: str) -> None:
    classes = {cls for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for cls in _as_tuple(entry)}
    declared = tuple(config.architectures or ())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (declared and not classes.intersection(declared)):
        what = ", ".join(declared) or f"model type {config.model_type!r}"
        msg = f"{name} is no causal language model but {what}; only models that predict the next token are supported"
        raise SourceError(msg)


def _check_packages(config: PretrainedConfig, name: str) -> None:
    """Name what transformers does not: without it, it fails at a name that the package would have brought."""
    settings = getattr(config, "quantization_config", None) or {}
    is_gptq = isinstance(settings, dict) and settings.get("quant_method") == "gptq"
    if is_gptq and find_spec("gptqmodel") is None:
        msg = f"the weights of {name} are quantized by GPTQ, which needs a package that is missing: gptqmodel; or give"
        msg += " the model before it was quantized, and compress it by nncf.compress_weights (--int8)"
        raise SourceError(msg)


def _as_tuple(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)
