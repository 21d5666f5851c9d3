"""Count zeros behind the masks of a torch model."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from actsparse.sparsity_report import ZeroCounter
from actsparse.torch.insertion import named_masks, named_sparsifiers, record_calls
from actsparse.torch.layers import measure_sizes
from actsparse.torch.running import run_batches
from actsparse.torch.sparsifier import ActivationSparsifier


class TorchZeroCounter(ZeroCounter):
    """
    Count zeros behind the active masks of a torch model.

    :param model: The masked model, which is the one to run.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sparsifiers = {name: sparsifier for name, sparsifier in named_sparsifiers(model) if sparsifier.is_active}
        super().__init__(model, named_masks(model, only_active=True), measure_sizes(model))

    def run_batches(self, batches: Iterable[Any], *, total: int | None, description: str) -> int:
        """Run every batch; see `ZeroCounter`."""
        return run_batches(self.model, batches, total=total, description=description)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count while the model runs."""
        with ExitStack() as stack:
            for name, sparsifier in self._sparsifiers.items():
                stack.enter_context(record_calls(sparsifier, partial(self._count, name, sparsifier)))
            yield

    def _count(self, name: str, sparsifier: ActivationSparsifier, args: Any, _kwargs: Any, output: Any) -> None:
        if not self._is_paused:
            self.add(name, sparsifier.count_zeros(args[0], output), output.numel())
