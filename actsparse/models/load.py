"""Load a model by whatever name the user has for it."""

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from actsparse.errors import SourceError
from actsparse.models.default import load_default
from actsparse.models.folder import is_openvino_folder, load_folder, load_openvino_folder, load_tokenizer
from actsparse.models.gguf import load_gguf
from actsparse.models.hub import fetch_from_hub
from actsparse.storage.files import kind_of

_logger = logging.getLogger(__name__)

DEVICES = ("cpu", "auto")


@dataclass(frozen=True)
class LoadedModel:
    """
    A model ready to run, with its tokenizer.

    :param model: The causal language model: a torch model in eval mode, or an `OVModelForCausalLM`.
    :param tokenizer: Its tokenizer.
    :param name: The name it was asked for by.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    max_memory: int | None = None,
    torch_only: bool = False,
    tokenizer: str | None = None,
) -> LoadedModel:
    """
    Load a causal language model and its tokenizer; no code and no pickle from the source is ever run.

    :param name: ``default``, a local folder, a ``.gguf`` file, or a hub id such as ``HuggingFaceTB/SmolLM2-135M``. Of a
        folder with an OpenVINO model, that is loaded, as `load_causal_lm` does.
    :param dtype: The type of the weights; GGUF weights are dequantised to it, OpenVINO models keep theirs.
    :param device: ``cpu``, or ``auto``: accelerators first, then memory, then what is left stays on disk and is loaded
        block by block while the model runs.
    :param max_memory: With ``auto``, how much of this machine's memory weights may take, in bytes; None takes what is
        free.
    :param torch_only: Whether to take a folder's torch weights even where an OpenVINO model lies beside them.
    :param tokenizer: A folder with the tokenizer to take instead of the model's own.
    :return: The model in eval mode, and its tokenizer.
    :raises SourceError: If the model cannot be found, reached or read, or is no causal language model.
    """
    placement = _place(name, device, max_memory)
    given = None if tokenizer is None else load_given_tokenizer(tokenizer)
    if name == "default":
        model, own = load_default(dtype, **placement)
    elif (path := find_local(name)) is None:
        model, own = load_folder(fetch_from_hub(name), name, dtype, **placement)
    elif is_openvino_folder(path) and not torch_only:
        if placement:
            msg = f"{name} is an OpenVINO model, which is loaded as a whole: --device auto is for torch models"
            raise SourceError(msg)
        model, own = load_openvino_folder(path, name)
        return LoadedModel(model, own if given is None else given, name)
    elif kind_of(path) == "folder":
        model, own = load_folder(path, name, dtype, **placement)
    elif placement:
        msg = f"{name} is a GGUF file, whose weights are all loaded at once: --device auto is for folders and hub ids"
        raise SourceError(msg)
    else:
        model, own = load_gguf(path, name, dtype, given)
    return LoadedModel(model.eval(), own if given is None else given, name)


def load_given_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer that a user names.

    :param folder: A local folder.
    :raises SourceError: If there is none, or it is unreadable.
    """
    path = Path(folder).expanduser()
    if kind_of(path) != "folder":
        msg = f"there is no folder {folder!r} with a tokenizer"
        raise SourceError(msg)
    return load_tokenizer(path, folder)


def _place(name: str, device: str, max_memory: int | None) -> dict[str, Any]:
    if device not in DEVICES:
        msg = f"--device is {device!r}; it is one of {', '.join(DEVICES)}"
        raise SourceError(msg)
    if device == "cpu":
        if max_memory is not None:
            msg = "--max-memory says how much of the memory --device auto may take: give that too"
            raise SourceError(msg)
        return {}
    if find_spec("accelerate") is None:
        msg = f"--device auto needs accelerate to place {name}: install actsparse[hub]"
        raise SourceError(msg)
    return {"device_map": "auto"} | ({"max_memory": _limit_memory(max_memory)} if max_memory is not None else {})


def _limit_memory(max_memory: int) -> dict[int | str, int]:
    from accelerate.utils import get_max_memory

    limits: dict[Any, Any] = get_max_memory()
    return limits | {"cpu": max_memory}


def find_local(name: str) -> Path | None:
    """
    Find the file or folder of a name, or tell that it must be a hub id.

    :param name: What the caller wrote.
    :return: The existing path, or ``None`` where the name may be a hub id.
    :raises SourceError: If the name is empty, or can only be a path but nothing lies there or it cannot be reached.
    """
    try:
        path = Path(name).expanduser()
        if name.strip() and kind_of(path):
            return path
    except RuntimeError:  # no such user
        _logger.debug("%r is no usable path", name, exc_info=True)
    is_path = name.startswith((".", "/", "~")) or name.endswith(("/", ".gguf")) or name.count("/") > 1 or "\\" in name
    if is_path or not name.strip():
        msg = f"there is no model at {name!r}; give a folder, a .gguf file, a hub id, or `default`"
        raise SourceError(msg)
    return None
