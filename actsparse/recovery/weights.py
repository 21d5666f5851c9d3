"""What recovery trains: the weights of masked layers, low-rank additions to them, or the masks' biases."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils import parametrize

from actsparse.mask import LARGEST
from actsparse.torch.sparsifier import ActivationSparsifier


class TrainedWeights(Protocol):
    """
    Weights in training, and the dense model's as they were.

    :param parameters: What is trained, by name.
    :param scales: By how much the learning rate of some of them is multiplied; of the others by 1.
    """

    parameters: dict[str, torch.Tensor]
    scales: dict[str, float]

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
        self.parameters: dict[str, torch.Tensor] = {}
        self.scales: dict[str, float] = {}
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
        self.parameters: dict[str, torch.Tensor] = {}
        self.scales: dict[str, float] = {}
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


class Biases:
    """
    Train the biases that compensate for what masks leave out (SPON, arXiv 2512.12744), one vector for each site.

    A step is as large a part of its threshold at every site: activations differ a thousandfold from layer to layer.
    """

    def __init__(self, masks: dict[str, ActivationSparsifier], channels: Mapping[str, int]) -> None:
        self.parameters: dict[str, torch.Tensor] = {}
        self.scales: dict[str, float] = {}
        self._before = [(mask, mask.bias) for mask in masks.values()]
        for name, mask in masks.items():
            if mask.site not in self.parameters:
                start = mask.threshold.new_zeros(channels[name]) if mask.bias is None else mask.bias
                # The same for all layers of the site, and no parameter: masks hold it as a buffer.
                self.parameters[mask.site] = start.detach().clone()
                threshold = mask.threshold[mask.threshold < LARGEST].clamp(min=0.0)
                self.scales[mask.site] = float(threshold.median()) if len(threshold) else 0.0
            mask.bias = self.parameters[mask.site]

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Let the model compute as it did: without its masks it has no biases."""
        yield

    def keep(self) -> None:
        """Leave the masks with what was trained."""
        for mask, _ in self._before:
            mask.bias = self.parameters[mask.site].detach()

    def undo(self) -> None:
        """Leave the masks with the biases they had."""
        for mask, bias in self._before:
            mask.bias = bias


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
