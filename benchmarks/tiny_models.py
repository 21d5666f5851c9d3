"""Tiny random models of several architectures, and the name patterns of their feed-forward layers."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from workload import Batch

Patterns = tuple[tuple[str, ...], tuple[str, ...]]
GATED: Patterns = ((".*up_proj.*", ".*gate_proj.*"), (".*down_proj.*",))
# Patterns of the layers that get 30% and of those that get 50%.
FAMILIES: dict[str, Patterns] = {
    "llama": GATED,
    "qwen3": GATED,
    "gemma3_text": GATED,
    "mistral": GATED,
    "phi3": ((".*gate_up_proj.*",), (".*down_proj.*",)),
    "gpt_neox": ((".*dense_h_to_4h.*",), (".*dense_4h_to_h.*",)),
    "opt": ((".*fc1.*",), (".*fc2.*",)),
    "bert": ((".*intermediate.*",), ("encoder/output/.*",)),
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
# Where an architecture has its own names, or would else be the same as another.
TINY_CHANGES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "mistral": {"sliding_window": 8},
}


def make_tiny(family: str) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """
    Make a tiny random model and tokens for it.

    :param family: Its architecture, as transformers calls it.
    :return: The model, calibration batches and held-out batches.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(TINY | TINY_CHANGES.get(family, {})))
    factory = AutoModel if family == "bert" else AutoModelForCausalLM
    model = factory.from_config(config, attn_implementation="sdpa").eval()
    tokens = [torch.randint(3, TINY["vocab_size"], (2, 24)) for _ in range(9)]
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in tokens]
    return model, batches[:6], batches[6:]
