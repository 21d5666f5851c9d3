"""The sizes of a layer's weights, whatever they are stored as."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from actsparse.measurements.probe import Probe


def measure_weight_squares(probe: Probe) -> dict[str, torch.Tensor]:
    """
    Run one batch and see the weights as they are multiplied.

    :param probe: The model.
    :return: By layer the sum of squares of each input channel's weights, [in_features]; of each row's where rows are
        masked, [out_features].
    """
    reader = _WeightReader({name for name, site in probe.sites.items() if site.gate_function})

    def expect(name: str, x: torch.Tensor) -> torch.Tensor:
        reader.expected = name
        return x

    with probe.watch(expect), reader:
        probe.run(probe.batches[:1], "reading weights")
    return reader.squares


class _WeightReader(TorchFunctionMode):
    """
    See each layer's weight as it is multiplied: decompressed, whatever it is stored as.

    :param of_rows: The layers whose rows are summed up, and not their input channels.
    """

    def __init__(self, of_rows: set[str]) -> None:
        super().__init__()
        self._of_rows = of_rows
        self.expected: str | None = None
        self.squares: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.expected is not None and func in (F.linear, torch.addmm):
            weight = args[1].T if func is F.linear else args[2]
            squares = weight.detach().float().square()
            self.squares[self.expected] = squares.sum(0 if self.expected in self._of_rows else 1).cpu()
            self.expected = None
        return func(*args, **(kwargs or {}))
