"""Models in GGUF files."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actsparse.errors import SourceError
from actsparse.models.explain import explain_errors
from actsparse.models.gguf_header import check_header
from actsparse.models.gguf_tokenizer import build_gguf_tokenizer
from actsparse.models.quiet import quiet_libraries
from actsparse.models.weights import load_weights


def load_gguf(
    path: Path, name: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a GGUF file, dequantising its weights.

    :param tokenizer: The tokenizer to take; None builds the file's own.
    :raises SourceError: If the file is not a complete GGUF file of a supported causal language model.
    """
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    with quiet_libraries(), explain_errors(name):
        _check_gguf(path, name)
        check_header(path)
        with _read_once():
            tokenizer = build_gguf_tokenizer(path, name) if tokenizer is None else tokenizer
            model = load_weights(path.parent, name, dtype=dtype, **options)
    return model, tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Parse a file's vocabulary once, which takes seconds: for tokenizer, configuration and weights alike."""
    import gguf  # only installed with the `hub` extra

    reader = gguf.GGUFReader
    parse = cache(reader)
    gguf.GGUFReader = lambda path, *options: parse(str(path), *options)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _check_gguf(path: Path, name: str) -> None:
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            msg = f"{name} is not a GGUF file; give a folder with a config.json, or a .gguf file"
            raise SourceError(msg)
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        msg = "GGUF files, the default model among them, need two more packages: pip install 'actsparse[hub]'"
        raise SourceError(msg)
