"""A tiny model in a folder of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast


def _make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def _make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    _make_tokenizer().save_pretrained(folder)
    return folder


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.fixture(scope="session")
def make_llama() -> Callable[[], LlamaForCausalLM]:
    return _make_llama


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    return _make_tokenizer


@pytest.fixture(scope="session")
def save() -> Callable[[PreTrainedModel, Path], Path]:
    return _save


@pytest.fixture(scope="session")
def truncate() -> Callable[[Path], None]:
    return _truncate


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return _save(_make_llama(), tmp_path / "model")
