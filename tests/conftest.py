"""Tiny seeded models of nine architectures, tiny batches, and quiet libraries."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A build server, for nncf and openvino: otherwise they report each kind of operation that they convert to Intel, from
# a new fork of this process each time. Not "true", under which hypothesis always draws the same examples.
os.environ["TF_BUILD"] = "tests"

import nncf
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from actsparse.storage.assets import cache_dir
from actsparse.texts import load_pages, token_batches

# A busy machine is no failure.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

VOCABULARY = 64
SENTENCE = "the of and to in a is that for it as was with be by on not he his but at are this have from one or had"
WORDS = SENTENCE.split()
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**GROUPED, head_dim=8),
    "phi3": lambda: Phi3Config(**GROUPED, pad_token_id=0),
    "mistral": lambda: MistralConfig(**GROUPED),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_inner=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, bos_token_id=0, eos_token_id=0),
    "opt": lambda: OPTConfig(
        **{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32
    ),
    "bert": lambda: BertConfig(**SIZES),
}
# Not among the architectures that every test runs on: experts see few tokens each, and roles repeat in a block.
MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        decoder_sparse_step=1,
    ),
}

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="session", autouse=True)
def single_traces() -> Iterator[None]:
    """Trace once: torch traces again to warn of differences, and exports keep its warnings to themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.jit._trace._check_trace", lambda *_, **__: None)
        yield


@pytest.fixture(autouse=True)
def quiet_libraries() -> Iterator[None]:
    # Not nncf.set_log_level, which also turns down pytest's own handlers.
    nncf_logger = logging.getLogger("nncf")
    level = nncf_logger.level
    nncf_logger.setLevel(logging.ERROR)
    yield
    nncf_logger.setLevel(level)


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Make a tiny model in evaluation mode; equal arguments give equal models."""

    def make(
        architecture: str = "llama", *, attn_implementation: str | None = None, dtype: torch.dtype = torch.float32
    ) -> PreTrainedModel:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            config = (CONFIGS | MIXTURES)[architecture]()
            auto: Any = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
            model = auto.from_config(config, attn_implementation=attn_implementation)
        finally:
            transformers_logging.set_verbosity(verbosity)
        # Wider than the usual initialisation, so that tokens differ from each other and masks change the output.
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3, generator=generator)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def llama(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="session")
def make_batches() -> Callable[..., list[dict[str, torch.Tensor]]]:
    """Make batches of random tokens; equal arguments give equal batches."""

    def make(num_batches: int = 4, *, batch_size: int = 2, length: int = 16) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        size = (batch_size, length)
        return [{"input_ids": torch.randint(0, VOCABULARY, size, generator=generator)} for _ in range(num_batches)]

    return make


@pytest.fixture
def batches(make_batches: Callable[..., list[dict[str, torch.Tensor]]]) -> list[dict[str, torch.Tensor]]:
    return make_batches()


@pytest.fixture(scope="session")
def compress() -> Callable[..., Any]:
    """Compress a model's weights to INT8 with NNCF."""

    def run(model: nn.Module, mode: nncf.CompressWeightsMode = nncf.CompressWeightsMode.INT8_ASYM) -> Any:
        example = {"input_ids": torch.arange(8).reshape(1, 8)}
        return nncf.compress_weights(model, mode=mode, dataset=nncf.Dataset([example]))

    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[nn.Module], Any]:
    """Take down everything about a model that a mask could change; equal pictures mean an unchanged model."""

    def take(model: nn.Module) -> Any:
        state = {name: (tensor.dtype, tensor.clone().tolist()) for name, tensor in model.state_dict().items()}
        modules = {
            name: (
                type(module),
                module.training,
                # Of hooks, what they are; of the rest, which attributes there are.
                {key: list(value.values()) for key, value in vars(module).items() if key.endswith("_hooks")},
                sorted(vars(module)),
                getattr(module, "is_active", None),
            )
            for name, module in model.named_modules()
        }
        return state, modules, {name: id(parameter) for name, parameter in model.named_parameters()}

    return take


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, its tokenizer and tiny texts, as a user would have them."""
    folder = tmp_path_factory.mktemp("cli")
    vocabulary = {word: number for number, word in enumerate(["<s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    text = " ".join(WORDS[(i * i + i // 7) % len(WORDS)] for i in range(1200))
    (folder / "calibration.txt").write_text(text)
    (folder / "evaluation.txt").write_text(" ".join(reversed(text.split()))[:900])
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\0\1\2\xff")
    return folder


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, for it and for processes that it starts; extensions need not be built again."""
    folder = tmp_path_factory.mktemp("cache")
    built = cache_dir() / "extension"
    built.mkdir(parents=True, exist_ok=True)
    (folder / built.name).symlink_to(built)
    monkeypatch.setenv("ACTSPARSE_CACHE", str(folder))
    return folder


@pytest.fixture
def small_language_model(files: Path) -> tuple[Any, Any, tuple[str, ...], Any]:
    """The model of `files`, wide enough that masks change its output, its tokenizer, pages and calibration batches."""
    model = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    batches = token_batches(tokenizer, load_pages(files / "calibration.txt"), num_batches=2, length=32)
    return model, tokenizer, load_pages(files / "evaluation.txt").pages, batches
