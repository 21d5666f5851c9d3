"""The activation functions of gated feed-forward networks."""

from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import nn

from actsparse.errors import ScopeError
from actsparse.torch.gates import _find_readers, find_gate_functions
from actsparse.torch.layers import find_layers, trace_graph

FUNCTIONS = {
    "llama": "mlp.act_fn",
    "qwen3": "mlp.act_fn",
    "gemma3": "mlp.act_fn",
    "mistral": "mlp.act_fn",
    # One layer for gate and up, or no gate: nothing to tell rows by.
    "phi3": None,
    "gpt2": None,
    "gpt_neox": None,
    "opt": None,
    "bert": None,
}


def find(model: Any, example: Any) -> dict[str, str]:
    layers = find_layers(model, trace_graph(model, example))
    return find_gate_functions(model, example, layers, layers)


def test_each_up_projection_has_the_function_of_its_own_block(
    architecture: str, make_model: Any, batches: list[Any]
) -> None:
    found = find(make_model(architecture), batches[0])
    name = FUNCTIONS[architecture]
    blocks = [f"model.layers.{i}." for i in range(2)] if name else []
    assert found == {f"{block}mlp.up_proj": f"{block}{name}" for block in blocks}


def test_only_what_is_matched_is_found(llama: Any, batches: list[Any]) -> None:
    layers = find_layers(llama, trace_graph(llama, batches[0]))
    matched = [layer for layer in layers if "layers.1" in layer.name]
    assert list(find_gate_functions(llama, batches[0], matched, layers)) == ["model.layers.1.mlp.up_proj"]


class Network(nn.Module):
    """A gated network that computes its activation without a module, or shares it with another one."""

    def __init__(self, activation: nn.Module | None) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate(x)
        return self.down((self.activation(gate) if self.activation else nn.functional.silu(gate)) * self.up(x))


def test_a_function_that_is_no_module_is_named() -> None:
    with pytest.raises(ScopeError, match="no module computes the activation function between gate and up"):
        find(Network(None), torch.randn(2, 3, 8))


def test_a_function_that_two_gates_share_is_refused() -> None:
    shared = nn.SiLU()
    with pytest.raises(ScopeError, match="no module computes"):
        find(nn.Sequential(Network(shared), Network(shared)), torch.randn(2, 3, 8))


@pytest.mark.parametrize("activations", [[nn.SiLU() for _ in range(4)], [None] * 4])
def test_one_gates_output_is_held_at_a_time(activations: list[nn.Module | None]) -> None:
    networks = [Network(activation) for activation in activations]
    alive: WeakSet[torch.Tensor] = WeakSet()
    counts = []

    def count(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        counts.append(len(alive))
        alive.add(output)

    gates = {f"{number}.gate" for number in range(4)}
    for network in networks:
        network.gate.register_forward_hook(count)
    found = _find_readers(nn.Sequential(*networks), torch.randn(2, 3, 8), gates)
    assert found.keys() == (gates if activations[0] else set())
    assert counts == [0, 0, 0, 0]
    assert not alive
