"""Layers' weights as they are multiplied, whatever they are stored as."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from actsparse.calibration import require_seen
from actsparse.torch.insertion import call_before
from actsparse.torch.measurements.probe import Probe
from actsparse.torch.wrappers import get_layer

# The directions of a decomposition depend on what it starts from: the same for every run.
SEED = 0
POWER_ITERATIONS = 4


def measure_weight_squares(probe: Probe) -> dict[str, torch.Tensor]:
    """
    Run the model and see the weights as they are multiplied.

    :return: By layer the sum of squares of each input channel's weights, [in_features]; of each row's where rows are
        masked, [out_features].
    :raises DatasetError: If a layer never runs.
    """
    of_rows = {name for name, site in probe.sites.items() if site.gate_function}
    squares: dict[str, torch.Tensor] = {}

    def take(name: str, weight: torch.Tensor) -> None:
        squares[name] = weight.square().sum(1 if name in of_rows else 0).cpu()

    _read_weights(probe, take)
    return squares


def measure_right_vectors(probe: Probe, ranks: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """
    Run the model, and decompose the weights of sites, the layers of each stacked.

    :param ranks: How many singular vectors are wanted of each site.
    :return: The leading right ones, [in_features, rank].
    :raises DatasetError: If a layer never runs.
    """
    missing = {name: {layer.name for layer in probe.sites[name].layers} for name in ranks}
    stacks: dict[str, list[torch.Tensor]] = {name: [] for name in ranks}
    found: dict[str, torch.Tensor] = {}

    def take(name: str, weight: torch.Tensor) -> None:
        site = probe.sparsifiers[name].site
        if site not in missing:
            return
        stacks[site].append(weight)
        missing[site].discard(name)
        if not missing[site]:
            # Only one site's weights are held at a time.
            found[site] = _right_vectors(torch.cat(stacks.pop(site)), ranks[site]).cpu()

    _read_weights(probe, take)
    return found


def _right_vectors(weight: torch.Tensor, rank: int) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        wanted = min(rank + 8, *weight.shape)  # a few more make the last ones exact
        vectors = torch.svd_lowrank(weight, q=wanted, niter=POWER_ITERATIONS)[2]
    return vectors[:, :rank].contiguous()


def _read_weights(probe: Probe, take: Callable[[str, torch.Tensor], None]) -> None:
    """Run batches until each layer has run; `take` gets its name and weight, [out_features, in_features], in f32."""
    reader = _WeightReader(take, set(probe.sparsifiers))
    with probe.suspend(), ExitStack() as stack, reader:
        for name in probe.sparsifiers:
            stack.enter_context(call_before(get_layer(probe.model, name), partial(reader.expect, name)))
        for batch in probe.batches:
            if reader.missing:
                probe.run([batch], "reading weights")
    require_seen(probe.sparsifiers, probe.sparsifiers.keys() - reader.missing)


class _WeightReader(TorchFunctionMode):
    """See each layer's weight as it is multiplied: decompressed, whatever it is stored as."""

    def __init__(self, take: Callable[[str, torch.Tensor], None], missing: set[str]) -> None:
        super().__init__()
        self.missing = missing
        self._take = take
        self._expected: str | None = None

    def expect(self, name: str, _layer: nn.Module) -> None:
        """Know which layer runs: the next product is its."""
        self._expected = name if name in self.missing else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._expected is not None and func in (F.linear, torch.addmm):
            name, self._expected = self._expected, None
            self.missing.discard(name)
            self._take(name, (args[1] if func is F.linear else args[2].T).detach().float())
        return func(*args, **(kwargs or {}))
