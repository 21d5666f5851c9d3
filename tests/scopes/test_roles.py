"""Roles come from the graph alone: the same for every way a block can be written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nncf
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, JambaConfig, Lfm2Config, MambaConfig, RecurrentGemmaConfig

from actsparse.torch.layers import find_layers, trace_graph


@dataclass(frozen=True)
class RoleCase:
    """An architecture, how its second block is called, and the roles of that block's layers."""

    architecture: str
    block: str
    roles: dict[str, tuple[str, ...]]


SEPARATE_QKV = {f"self_attn.{letter}_proj": ("attention.qkv",) for letter in "qkv"}
GATED = SEPARATE_QKV | {
    "self_attn.o_proj": ("attention.out",),
    "mlp.gate_proj": ("ffn.gate",),
    "mlp.up_proj": ("ffn.up",),
    "mlp.down_proj": ("ffn.down",),
}
CASES = [
    *(RoleCase(name, "model.layers.1", GATED) for name in ("llama", "qwen3", "gemma3", "mistral")),
    RoleCase(
        "phi3",
        "model.layers.1",
        {
            "self_attn.qkv_proj": ("attention.qkv",),
            "self_attn.o_proj": ("attention.out",),
            "mlp.gate_up_proj": ("ffn.gate", "ffn.up"),
            "mlp.down_proj": ("ffn.down",),
        },
    ),
    RoleCase(
        "gpt2",
        "transformer.h.1",
        {
            "attn.c_attn": ("attention.qkv",),
            "attn.c_proj": ("attention.out",),
            "mlp.c_fc": ("ffn.in",),
            "mlp.c_proj": ("ffn.down",),
        },
    ),
    RoleCase(
        "gpt_neox",
        "gpt_neox.layers.1",
        {
            "attention.query_key_value": ("attention.qkv",),
            "attention.dense": ("attention.out",),
            "mlp.dense_h_to_4h": ("ffn.in",),
            "mlp.dense_4h_to_h": ("ffn.down",),
        },
    ),
    RoleCase(
        "opt",
        "model.decoder.layers.1",
        SEPARATE_QKV | {"self_attn.out_proj": ("attention.out",), "fc1": ("ffn.in",), "fc2": ("ffn.down",)},
    ),
    RoleCase(
        "bert",
        "bert.encoder.layer.1",
        {
            "attention.self.query": ("attention.qkv",),
            "attention.self.key": ("attention.qkv",),
            "attention.self.value": ("attention.qkv",),
            "attention.output.dense": ("attention.out",),
            "intermediate.dense": ("ffn.in",),
            "output.dense": ("ffn.down",),
        },
    ),
]

by_architecture = pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture)


def find_roles_of(model: nn.Module, example: Any) -> dict[str, tuple[str, ...]]:
    return {layer.name: layer.roles for layer in find_layers(model, trace_graph(model, example))}


def assert_roles(case: RoleCase, roles: dict[str, tuple[str, ...]]) -> None:
    prefix = f"{case.block}."
    assert {n.removeprefix(prefix): r for n, r in roles.items() if n.startswith(prefix)} == case.roles
    blocks = case.block.removesuffix("1")
    outside = [r for n, r in roles.items() if r and not n.startswith(blocks)]
    assert outside == [("head",)]


@by_architecture
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_layer_of_a_block_has_its_role(
    case: RoleCase, attention: str, make_model: Any, batches: list[Any]
) -> None:
    model = make_model(case.architecture, attn_implementation=attention)
    assert_roles(case, find_roles_of(model, batches[0]))


@by_architecture
@pytest.mark.parametrize("mode", [nncf.CompressWeightsMode.INT8_SYM, nncf.CompressWeightsMode.INT8_ASYM], ids=str)
def test_roles_are_the_same_after_nncf_compressed_the_weights(
    case: RoleCase, mode: nncf.CompressWeightsMode, make_model: Any, batches: list[Any], compress: Callable[..., Any]
) -> None:
    model = compress(make_model(case.architecture), mode)
    assert_roles(case, find_roles_of(model, batches[0]))


@by_architecture
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)], ids=str)
def test_roles_do_not_depend_on_the_shape_of_the_example(
    case: RoleCase, size: tuple[int, int], make_model: Any
) -> None:
    model = make_model(case.architecture)
    assert_roles(case, find_roles_of(model, {"input_ids": torch.ones(size, dtype=torch.int64)}))


class Gated(nn.Module):
    """A gated network whose up projection is called first, and is not the one behind the activation function."""

    def __init__(self, width: int = 12, out: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, width), nn.Linear(8, width)
        self.down = nn.Linear(width, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.first(x)
        return self.down(up * torch.sigmoid(self.second(x)))


def test_the_gate_is_the_layer_behind_the_activation_function_whatever_is_called_first() -> None:
    assert find_roles_of(Gated(), torch.ones(1, 2, 8)) == {
        "first": ("ffn.up",),
        "second": ("ffn.gate",),
        "down": ("ffn.down",),
    }


def test_a_network_that_does_not_give_back_its_inputs_width_is_no_feed_forward_network() -> None:
    roles = find_roles_of(Gated(out=5), torch.ones(1, 2, 8))
    assert roles == {"first": (), "second": (), "down": ("head",)}


def test_linear_layers_without_an_activation_function_between_them_are_no_network() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    assert find_roles_of(model, torch.ones(1, 2, 8)) == {"0": (), "1": ("head",)}


class TwoOutputs(nn.Module):
    """A model that gives back logits, and what they are computed from."""

    def __init__(self, is_sum: bool) -> None:
        super().__init__()
        self.network, self.head, self.other = Gated(), nn.Linear(8, 20), nn.Linear(8, 20)
        self.is_sum = is_sum

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x + self.network(x)
        logits = self.head(hidden)
        return 30 * torch.tanh((logits + self.other(hidden) if self.is_sum else logits) / 30), hidden


@pytest.mark.parametrize(("is_sum", "roles"), [(False, ("head",)), (True, ())])
def test_the_head_alone_makes_an_output_of_the_model(is_sum: bool, roles: tuple[str, ...]) -> None:
    found = find_roles_of(TwoOutputs(is_sum), torch.ones(1, 2, 8))
    assert found["head"] == roles
    assert found["network.down"] == ("ffn.down",)


# ---- Mixers that are no attention

HYBRID: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HYBRIDS: dict[str, tuple[Callable[[], Any], str]] = {
    "mamba": (lambda: MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), "mixer"),
    "jamba": (
        lambda: JambaConfig(
            **HYBRID, num_experts=1, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
        ),
        "mamba",
    ),
    "lfm2": (lambda: Lfm2Config(**HYBRID, full_attn_idxs=[1], block_auto_adjust_ff_dim=False), "conv"),
    "recurrent_gemma": (
        lambda: RecurrentGemmaConfig(**HYBRID | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=16),
        "temporal_block.linear",
    ),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_mixers_that_are_no_attention_have_no_role(name: str) -> None:
    make, mixer = HYBRIDS[name]
    model = AutoModelForCausalLM.from_config(make()).eval()
    roles = find_roles_of(model, {"input_ids": torch.arange(12)[None]})
    assert {role for layer, role in roles.items() if f".{mixer}" in layer} == {()}
    assert roles["lm_head"] == ("head",)
    rest = {layer: role for layer, role in roles.items() if f".{mixer}" not in layer and layer != "lm_head"}
    assert all(rest.values())
    if name != "mamba":
        assert {role for given in rest.values() for role in given} == {
            "attention.qkv", "attention.out", "ffn.gate", "ffn.up", "ffn.down"
        }  # fmt: skip
