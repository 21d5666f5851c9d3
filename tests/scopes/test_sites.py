"""Sites: layers that read one tensor stand together, and no others do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from actsparse.scopes import group_sites
from actsparse.torch.layers import find_layers, trace_graph


@dataclass(frozen=True)
class SiteCase:
    """An architecture, how its second block is called, and the sites of that block."""

    architecture: str
    block: str
    sites: tuple[tuple[str, ...], ...]


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
CASES = [
    *(SiteCase(name, "model.layers.1", GATED) for name in ("llama", "qwen3", "gemma3", "mistral")),
    SiteCase(
        "phi3",
        "model.layers.1",
        (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    ),
    SiteCase("gpt2", "transformer.h.1", (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))),
    SiteCase(
        "gpt_neox",
        "gpt_neox.layers.1",
        (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    ),
    SiteCase("opt", "model.decoder.layers.1", (QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",))),
    SiteCase(
        "bert",
        "bert.encoder.layer.1",
        (
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.output.dense",),
            ("intermediate.dense",),
            ("output.dense",),
        ),
    ),
]


def find_sites(model: nn.Module, example: Any) -> list[tuple[str, ...]]:
    sites = group_sites(find_layers(model, trace_graph(model, example)))
    assert all(site.name == site.layers[0].name for site in sites)
    return [tuple(layer.name for layer in site.layers) for site in sites]


@pytest.mark.parametrize("is_compressed", [False, True], ids=["dense", "INT8"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture)
def test_layers_that_read_one_tensor_are_one_site(
    case: SiteCase, is_compressed: bool, make_model: Any, batches: list[Any], compress: Callable[..., Any]
) -> None:
    model = make_model(case.architecture)
    sites = find_sites(compress(model) if is_compressed else model, batches[0])
    prefix = f"{case.block}."
    of_block = [tuple(name.removeprefix(prefix) for name in site) for site in sites if site[0].startswith(prefix)]
    assert tuple(of_block) == case.sites


class Branches(nn.Module):
    """Two layers read one tensor through a reshape; a third reads another tensor with the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 4)
        return self.a(x).reshape(-1, 4) + self.b(flat) + self.c(flat * 1.0)


def test_a_reshape_does_not_part_a_site_and_arithmetic_does() -> None:
    assert find_sites(Branches(), torch.ones(2, 3, 4)) == [("a", "b"), ("c",)]


class Repeated(nn.Module):
    """One layer called twice, and another that shares only its first input."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.once(x) + self.twice(self.twice(x))


def test_a_layer_called_twice_is_a_site_of_its_own() -> None:
    assert sorted(find_sites(Repeated(), torch.ones(2, 4))) == [("once",), ("twice",)]


def test_no_layers_give_no_sites() -> None:
    assert group_sites([]) == []
