"""A torch model taken apart into blocks that run on their own."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from torch import nn

from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.errors import ActsparseError
from actsparse.mask import mask_small
from actsparse.runtime.progress import progress_bar
from actsparse.torch.insertion import record_calls
from actsparse.torch.layers import name_blocks
from actsparse.torch.measurements.probe import Probe, watch
from actsparse.torch.offload import hold_weights
from actsparse.torch.running import evaluation_mode
from actsparse.torch.sparsifier import ActivationSparsifier

Calls = list[tuple[Any, Any, torch.Tensor]]


def take_apart(
    probe: Probe,
    layers: Collection[str],
    importance: Mapping[str, torch.Tensor],
    sketch: Callable[[], Mapping[str, MagnitudeSketch]],
) -> Iterator["TorchBlock"]:
    """
    Take the model apart into the elements of its module lists.

    :return: The blocks that have any of the layers, which see the first `PROBE_TOKENS` tokens.
    :raises ActsparseError: If a layer is in none, or the weights are compressed.
    """
    if hasattr(probe.model, ATR_HOOK_STORAGE):
        msg = "blocks of compressed weights cannot run alone: calibrate first, then compress, then load_thresholds"
        raise ActsparseError(msg)
    names = name_blocks(probe.model, layers)
    if "" in names:
        msg = f"layer {names[''][0]} is in no block: an allocation block by block is not for it"
        raise ActsparseError(msg)
    sketches = sketch()
    with progress_bar("blocks", total=len(names), unit="blocks") as advance:
        for block, inside in names.items():
            module = probe.model.get_submodule(block)
            masks = {name: probe.sparsifiers[name] for name in inside}
            scores = {name: (sketches[mask.site], importance[mask.site]) for name, mask in masks.items()}
            yield TorchBlock(module, partial(_record, probe, module), masks, scores)
            advance(1)


class TorchBlock:
    """
    A block and what it read; see `actsparse.algorithms.Block`.

    :param record: Gives positional and keyword arguments and the dense output of each call; called when first needed.
    :param scores: For each layer the sketch of its scores, and a.
    """

    def __init__(
        self,
        module: nn.Module,
        record: Callable[[], Calls],
        sparsifiers: Mapping[str, ActivationSparsifier],
        scores: Mapping[str, tuple[MagnitudeSketch, torch.Tensor]],
    ) -> None:
        self.layers = tuple(sparsifiers)
        self._module = module
        self._record = record
        self._sparsifiers = sparsifiers
        self._scores = scores

    @cached_property
    def _calls(self) -> Calls:
        return self._record()

    @cached_property
    def _energy(self) -> float:
        return sum(float(dense.float().square().sum()) for _, _, dense in self._calls)

    def error(self, sparsity: Mapping[str, float]) -> float:
        """
        Run the block with masks.

        :return: The norm of what its output moves by, beside the norm of the dense output.
        """
        thresholds = {
            name: sketch.quantile(sparsity[name]) / importance
            for name, (sketch, importance) in self._scores.items()
            if sparsity[name] > 0
        }
        moved = 0.0

        def leave_out(name: str, x: torch.Tensor) -> torch.Tensor:
            return mask_small(x, thresholds[name]) if name in thresholds else x

        calls = self._calls
        watching = watch(self._sparsifiers, leave_out)
        with evaluation_mode(self._module), torch.no_grad(), hold_weights(self._module), watching:
            for args, kwargs, dense in calls:
                output = _first_tensor(self._module(*args, **kwargs))
                moved += float((output - dense).float().square().sum())
        return (moved / max(self._energy, 1e-30)) ** 0.5


def _record(probe: Probe, block: nn.Module) -> Calls:
    calls: Calls = []

    def record(args: Any, kwargs: Any, output: Any) -> None:
        # Run again, a block must not append to a cache of the first run.
        fresh = {key: None if key == "past_key_values" else value for key, value in kwargs.items()}
        calls.append((args, fresh, _first_tensor(output)))

    with probe.suspend(), record_calls(block, record):
        probe.run(probe.first_batches, "running")
    return calls


def _first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
