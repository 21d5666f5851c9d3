"""From a model's name, or a built-in shape's, to its dense OpenVINO model in the cache."""

import copy
import gc
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from actsparse.commands.bench.decoder import find_unknown_inputs
from actsparse.commands.bench.memory import require_memory
from actsparse.errors import ActsparseError, SourceError
from actsparse.models import load_model
from actsparse.models.folder import is_openvino_folder, load_tokenizer
from actsparse.models.hub import fetch_from_hub
from actsparse.models.identity import model_identity
from actsparse.models.load import find_local
from actsparse.models.quiet import quiet_libraries
from actsparse.openvino.acceleration import is_accelerated
from actsparse.openvino.compression import compress_int4_aware
from actsparse.openvino.export import run_optimum
from actsparse.openvino.folder import MODEL_FILE
from actsparse.openvino.graph_masks import count_masks
from actsparse.openvino.require import require_optimum
from actsparse.runtime.progress import Say
from actsparse.storage import assets
from actsparse.storage.files import kind_of
from actsparse.texts import Text, load_pages, take_batches
from actsparse.torch.compression import compress_weights
from actsparse.torch.insertion import intercept_inputs

SEED = 0

_TINYLLAMA_1B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
_RELU_1B: dict[str, Any] = {**_TINYLLAMA_1B, "hidden_act": "relu"}
_LLAMA_3B: dict[str, Any] = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
# Models with random weights, so that speed can be measured without a hub.
SHAPES: dict[str, PretrainedConfig] = {
    "1b": LlamaConfig(**_TINYLLAMA_1B),
    "1b-relu": LlamaConfig(**_RELU_1B),
    "3b": LlamaConfig(**_LLAMA_3B),
}
# What share of a gate is zero in those of them that have ReLU, as in models that were trained for it (ProSparse: 89%).
PLANTED_ZEROS = 0.9
# Of many sequences, as attention gives all tokens of one much in common.
_PLANTED_TOKENS = (12, 128)

# What compresses weights with data, and not with their values alone.
AWARE = "int4-aware"
# What `--weights` may be: what `compress_weights` is asked for; f16 leaves the weights as they are.
WEIGHTS = {"int8": "int8_asym", "int4": "int4_asym", AWARE: "int4_asym, aware", "f16": None}
# Bytes of each weight, scales and INT8 layers of INT4 models included.
WEIGHT_BYTES = {"int8": 1.05, "int4": 0.65, AWARE: 0.7, "f16": 2.0}
# How many input channels share a scale, where nothing else is asked for.
GROUP_SIZES = {"int4": 128, AWARE: 64}
# What AWARE learns from: windows of the default calibration text, and the tokens of each.
AWARE_DATA = {"most": 64, "length": 256}
# Raise it when the same model and libraries give another OpenVINO model than before.
_FORMAT = 1
_LIBRARIES = ("nncf", "openvino", "optimum-intel", "torch", "transformers")
_PARTS = ("config.json", MODEL_FILE, "openvino_model.bin")
# Bytes of memory for each parameter that export and compression take at their peak; 3.6 measured with `1b` as int8.
_EXPORT_BYTES = 4.5


@dataclass(frozen=True)
class DenseModel:
    """
    A dense OpenVINO model.

    :param weights: A name of `WEIGHTS`, or ``as stored``.
    """

    folder: Path
    weights: str
    has_text: bool

    @property
    def xml(self) -> Path:
        """The model's XML file."""
        return self.folder / MODEL_FILE

    @property
    def config(self) -> dict[str, Any]:
        """Its transformers configuration."""
        return json.loads((self.folder / "config.json").read_text())

    @property
    def max_length(self) -> int:
        """How many tokens it reads at most, as far as its configuration says."""
        config = self.config
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 2**31)

    def load_tokenizer(self) -> Any:
        """Load its tokenizer."""
        return load_tokenizer(self.folder, str(self.folder))


@dataclass(frozen=True)
class _Recipe:
    """
    How weights are made.

    :param weights: A name of `WEIGHTS`.
    :param group_size: Of INT4 weights.
    :param text: What AWARE learns from.
    """

    weights: str
    group_size: int | None = None
    text: Text | None = None


@dataclass(frozen=True)
class Source:
    """
    What a model's name stands for.

    :param identity: What tells it from other models and other versions of itself; what can be written as JSON.
    """

    name: str
    identity: Any
    config: PretrainedConfig | None = None
    path: Path | None = None

    @property
    def is_openvino(self) -> bool:
        """Whether it is an OpenVINO model already."""
        return self.path is not None and is_openvino_folder(self.path)

    @property
    def has_text(self) -> bool:
        """Whether there is a tokenizer: a shape has none, and an OpenVINO model may lack one."""
        return self.config is None and (not self.is_openvino or any(Path(self.path or "").glob("tokenizer*.json")))


def find_source(name: str) -> Source:
    """
    Find out what a name stands for, downloading a model of the hub.

    :param name: A built-in shape, ``default``, a folder (of an OpenVINO model too), a GGUF file or a hub id.
    :raises SourceError: If there is nothing of that name.
    """
    if name in SHAPES:
        return Source(name, [SHAPES[name].to_json_string(), SEED], config=SHAPES[name])
    if name == "default":
        return Source(name, model_identity(name))
    if re.fullmatch(r"[\d.]+b", name, re.IGNORECASE):
        msg = f"there is no built-in shape {name!r}; there are: {', '.join(SHAPES)}"
        raise SourceError(msg)
    path = find_local(name) or fetch_from_hub(name)
    return Source(name, model_identity(str(path)), path=path)


def prepare_dense(source: Source, weights: str | None, say: Say, *, group_size: int | None = None) -> DenseModel:
    """
    Return the dense OpenVINO model of a source, made on first use and kept in the cache.

    :param weights: A name of `WEIGHTS`, or None for int8, or for an OpenVINO model as it is.
    :param group_size: Input channels in a group of INT4 weights; None for what `GROUP_SIZES` says.
    :raises ActsparseError: If it cannot be loaded, exported or kept, or does not go with these weights.
    """
    if source.is_openvino and source.path is not None:
        return _use_openvino(source, source.path, weights)
    weights = weights or "int8"
    recipe = _make_recipe(source, weights, group_size)
    name = re.sub(r"[^\w.-]+", "-", Path(source.name).name)[:40]
    folder = assets.cache_dir() / "dense" / f"{name}-{weights}-{_key(source, recipe)}"
    if all(kind_of(folder / part) == "file" for part in _PARTS):
        return DenseModel(folder, weights, source.has_text)
    require_optimum("exporting a model to OpenVINO")
    if source.config is not None:
        require_memory(count_parameters(source.config) * _EXPORT_BYTES, f"making the {source.name} model")
    with assets.partial_folder() as partial:
        unfinished = partial / "model"
        _make(source, recipe, unfinished, partial / "f16", say)
        folder.parent.mkdir(exist_ok=True)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process finished first; its copy is as good.
            if not folder.is_dir():
                raise
    return DenseModel(folder, weights, source.has_text)


def require_plain(model: ov.Model, name: str) -> None:
    """
    Check that a model is a language model that a `Decoder` runs, and has no masks.

    :raises ActsparseError: If it is something else.
    """
    if count_masks(model) or is_accelerated(model):
        msg = f"{name} has masks already; give the dense model that they were made from"
        raise ActsparseError(msg)
    inputs = [port.get_any_name() for port in model.inputs]
    if find_unknown_inputs(inputs) or "input_ids" not in inputs or not model.get_sinks():
        msg = f"{name} is no stateful language model with the inputs of optimum-intel; its inputs: {', '.join(inputs)}"
        raise ActsparseError(msg)


def make_random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Make a model in fp16 with random weights; equal configurations give equal models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        # A copy, as transformers notes in the configuration what it was used for.
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float16).eval()
        if getattr(config, "hidden_act", "") == "relu":
            _plant_zeros(model, torch.randint(config.vocab_size, _PLANTED_TOKENS))
        return model


@torch.no_grad()
def _plant_zeros(model: Any, tokens: torch.Tensor) -> None:
    """
    Lower what gates give until most of it is negative.

    Random weights have half their gates open. Without biases, a gate is lowered along a direction that all tokens have
    in common; random embeddings have none, and get one.
    """
    table = model.get_input_embeddings().weight
    table += table.std()

    def lower(name: str, read: torch.Tensor) -> torch.Tensor:
        weight, x = model.get_submodule(name).weight, read.flatten(0, -2).float()
        common = x.mean(0)
        excess = (x @ weight.float().T).quantile(PLANTED_ZEROS, dim=0) / common.square().sum()
        weight -= (excess[:, None] * common).to(weight.dtype)
        return read

    gates = [name for name, _ in model.named_modules() if name.endswith(".gate_proj")]
    with intercept_inputs(model, gates, lower):
        model(input_ids=tokens)


def count_parameters(config: PretrainedConfig) -> int:
    """Count a model's parameters without making it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def _use_openvino(source: Source, folder: Path, weights: str | None) -> DenseModel:
    if weights is not None:
        msg = f"{source.name} is an OpenVINO model, whose weights stay as they are: leave --weights out"
        raise ActsparseError(msg)
    if kind_of(folder / "config.json") != "file":
        msg = f"{source.name} has an {MODEL_FILE} but no config.json"
        raise SourceError(msg)
    return DenseModel(folder, "as stored", source.has_text)


def _make_recipe(source: Source, weights: str, group_size: int | None) -> _Recipe:
    if group_size is not None and weights not in GROUP_SIZES:
        msg = f"{weights} weights have no groups: a group size goes with {' and '.join(GROUP_SIZES)}"
        raise ActsparseError(msg)
    if group_size is not None and (isinstance(group_size, bool) or group_size < 1):
        msg = f"the group size is {group_size!r}; it must be a whole number, at least 1"
        raise ActsparseError(msg)
    if weights != AWARE:
        return _Recipe(weights, group_size or GROUP_SIZES.get(weights))
    if source.config is not None:
        msg = f"{source.name} has random weights, which no text tells anything about: take int4, not {AWARE}"
        raise ActsparseError(msg)
    return _Recipe(weights, group_size or GROUP_SIZES[weights], load_pages("default", purpose="calibration"))


def _make(source: Source, recipe: _Recipe, target: Path, exported: Path, say: Say) -> None:
    if source.config is not None:
        say(f"making the {source.name} model with random weights (once)")
        model, tokenizer = make_random_model(source.config), None
    else:
        say(f"loading {source.name}")
        loaded = load_model(str(source.path or source.name), dtype=torch.float16)
        model, tokenizer = loaded.model, loaded.tokenizer
    say("exporting it to OpenVINO (once)")
    _export(model, recipe.weights, exported)
    if tokenizer is not None:
        tokenizer.save_pretrained(exported)
    # The torch model makes room for the compressed one.
    del model
    gc.collect()
    if WEIGHTS[recipe.weights] is None:
        exported.rename(target)
        return
    say(f"compressing its weights to {recipe.weights} (once)")
    shutil.copytree(exported, target, ignore=shutil.ignore_patterns("openvino_model.*"))
    compressed = _compress(ov.Core().read_model(exported / MODEL_FILE), recipe, tokenizer)
    ov.save_model(compressed, target / MODEL_FILE, compress_to_fp16=False)


def _compress(model: ov.Model, recipe: _Recipe, tokenizer: Any) -> ov.Model:
    if recipe.text is not None and recipe.group_size is not None:
        batches = take_batches(tokenizer, recipe.text, **AWARE_DATA)
        return compress_int4_aware(model, batches, group_size=recipe.group_size)
    options = {} if recipe.group_size is None else {"group_size": recipe.group_size}
    return compress_weights(model, WEIGHTS[recipe.weights] or "", **options)


def _export(model: PreTrainedModel, weights: str, folder: Path) -> None:
    from optimum.intel.openvino.configuration import OVConfig, OVWeightQuantizationConfig

    # Runtime options depend on whether the weights are going to be compressed.
    config = OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8)) if WEIGHTS[weights] else None
    with quiet_libraries():
        run_optimum(model, folder, ov_config=config, patch_16bit_model=True)


def _key(source: Source, recipe: _Recipe) -> str:
    parts = [_FORMAT, source.identity, WEIGHTS[recipe.weights], {name: version(name) for name in _LIBRARIES}]
    # What is made as ever is found where it ever was.
    if recipe.group_size != GROUP_SIZES.get(recipe.weights) or recipe.text is not None:
        parts.append(recipe.group_size)
    if recipe.text is not None:
        parts.append([AWARE_DATA, recipe.text.sha256])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
