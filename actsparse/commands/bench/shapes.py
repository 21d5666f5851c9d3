"""Built-in shapes: models with random weights, so that speed can be measured without a hub."""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

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

SHAPES: dict[str, PretrainedConfig] = {"1b": LlamaConfig(**_TINYLLAMA_1B), "3b": LlamaConfig(**_LLAMA_3B)}


def make_random_model(config: PretrainedConfig) -> PreTrainedModel:
    """
    Make a model in fp16 with random weights; equal configurations give equal models.

    :param config: Its shape.
    :return: The model in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        # A copy, as transformers notes in the configuration what it was used for.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float16).eval()


def count_parameters(config: PretrainedConfig) -> int:
    """
    Count a model's parameters without making it.

    :param config: Its shape.
    :return: How many it has.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())
