"""Weights as they are multiplied, each told from those of other layers."""

import pytest
import torch
from torch import nn

from actsparse import TargetScope, sparsify_activations
from actsparse.scopes import group_sites
from actsparse.torch.gates import find_gate_functions
from actsparse.torch.insertion import named_sparsifiers
from actsparse.torch.layers import find_layers, trace_graph
from actsparse.torch.measurements.torch_measurements import TorchMeasurements


class Network(nn.Module):
    """A gated network that multiplies by up before the gate is activated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, width), nn.Linear(8, width), nn.Linear(width, 8)
        self.activation = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = self.up(x)
        return self.down(self.activation(self.gate(x)) * up)


def norms(layer: nn.Module, dim: int) -> torch.Tensor:
    return layer.weight.detach().square().sum(dim).sqrt()  # type: ignore[operator]


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("is_down_masked", [False, True])
def test_rows_of_a_layer_that_runs_before_its_gate_have_their_own_norms(width: int, is_down_masked: bool) -> None:
    model, data = Network(width), [torch.randn(2, 3, 8)]
    layers = find_layers(model, trace_graph(model, data[0]))
    masked = [layer for layer in layers if is_down_masked or layer.name == "up"]
    gates = find_gate_functions(model, data[0], masked, layers)
    sparsify_activations(
        model, data, {TargetScope(names=[layer.name for layer in masked]): 0.5}, algorithm="magnitude+uniform+rows"
    )
    measurements = TorchMeasurements(model, data, group_sites(masked, gates), dict(named_sparsifiers(model)))
    torch.testing.assert_close(measurements.weight_norms("up"), norms(model.up, 1))
    if is_down_masked:
        torch.testing.assert_close(measurements.weight_norms("down"), norms(model.down, 0))
        torch.testing.assert_close(measurements.weight_norms("gate"), norms(model.gate, 0))


class Branches(nn.Module):
    """Only where the first number is positive, the second layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) if x.flatten()[0] > 0 else self.first(x)


def test_a_layer_that_the_first_batch_does_not_reach_is_read_from_a_later_one() -> None:
    model, data = Branches(), [torch.ones(1, 3, 8), -torch.ones(1, 3, 8)]
    sites = group_sites(find_layers(model, trace_graph(model, data[0])))
    sparsify_activations(model, data, 0.5)
    measurements = TorchMeasurements(model, data[::-1], sites, dict(named_sparsifiers(model)))
    torch.testing.assert_close(measurements.weight_norms("second"), norms(model.second, 0))
