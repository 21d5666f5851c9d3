"""What recovery trains: the weights of masked layers as a whole, or low-rank additions to them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils import parametrize


class TrainedWeights(Protocol):
    """Weights in training, and the dense model's as they were."""

    parameters: dict[str, nn.Parameter]

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Let the model compute with the weights it had."""
        ...

    def keep(self) -> None:
        """Leave the model with what was trained."""
        ...

    def undo(self) -> None:
        """Leave the model with the weights it had."""
        ...


class WholeWeights:
    """Train the weights themselves; costs a copy of them, and of course their gradients."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            # Layers may share one weight.
            if all(layer.weight is not known for known in self.parameters.values()):
                self.parameters[f"{name}.weight"] = layer.weight  # type: ignore[assignment]
        self._before = {name: weight.detach().clone() for name, weight in self.parameters.items()}

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Let the model compute with the weights it had."""
        trained = {name: weight.data for name, weight in self.parameters.items()}
        try:
            for name, weight in self.parameters.items():
                weight.data = self._before[name]
            yield
        finally:
            for name, weight in self.parameters.items():
                weight.data = trained[name]

    def keep(self) -> None:
        """Leave the model with what was trained."""

    def undo(self) -> None:
        """Leave the model with the weights it had."""
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(self._before[name])


class LowRankWeights:
    """Train an addition B A to each weight (LoRA, arXiv 2106.09685); B starts at zero, and the model as it was."""

    def __init__(self, layers: dict[str, nn.Module], rank: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, nn.Parameter] = {}
        self._added: list[tuple[nn.Module, _Addition]] = []
        by_weight = {id(layer.weight): (name, layer) for name, layer in reversed(layers.items())}
        for name, layer in by_weight.values():
            addition = _Addition(layer.weight, rank, generator)  # type: ignore[arg-type]
            parametrize.register_parametrization(layer, "weight", addition)
            self._added.append((layer, addition))
            self.parameters |= {f"{name}.{key}": parameter for key, parameter in addition.named_parameters()}

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Let the model compute with the weights it had."""
        try:
            for _, addition in self._added:
                addition.is_active = False
            yield
        finally:
            for _, addition in self._added:
                addition.is_active = True

    def keep(self) -> None:
        """Add what was trained to the weights, which are plain weights again."""
        self._remove(keep=True)

    def undo(self) -> None:
        """Leave the model with the weights it had."""
        self._remove(keep=False)

    def _remove(self, *, keep: bool) -> None:
        for layer, addition in self._added:
            addition.is_active = keep
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class _Addition(nn.Module):
    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        start = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.A = nn.Parameter(start.to(weight.device))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.is_active = True

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.B @ self.A).to(weight.dtype) if self.is_active else weight
