"""Many runs of a model side by side, so that each block's weights are loaded once for all of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from actsparse.errors import ActsparseError
from actsparse.torch.insertion import call_before
from actsparse.torch.layers import name_blocks
from actsparse.torch.offload import hold_weights, is_offloaded

T = TypeVar("T")

# So many forwards are in flight side by side; each keeps what its next block reads.
GROUP = 64
# Each kind of device has an autocast of its own.
DEVICES = ("cpu", "cuda", "xpu", "mps")


def run_blockwise(model: nn.Module, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """
    Run a model several times, so that each block's weights are loaded once for many runs.

    All runs wait in front of a block; it is loaded; one run after the other passes it and goes on to the next block,
    where it waits again. A model that is not offloaded simply runs once for each job.

    :raises ActsparseError: If the package that switches between runs is missing.
    """
    blocks = _blocks(model) if is_offloaded(model) else []
    if not blocks or len(jobs) < 2:
        return [job() for job in jobs]
    return [found for i in range(0, len(jobs), GROUP) for found in _run_group(blocks, jobs[i : i + GROUP])]


def _blocks(model: nn.Module) -> list[nn.Module]:
    names = name_blocks(model, (name for name, _ in model.named_modules()))
    return [block for name in names if name and is_offloaded(block := model.get_submodule(name))]


def _run_group(blocks: Iterable[nn.Module], jobs: Sequence[Callable[[], T]]) -> list[T]:
    greenlets = _import_greenlet()
    scheduler = greenlets.getcurrent()
    modes_of_caller = _modes_of_now()

    def wait(block: nn.Module) -> None:
        if greenlets.getcurrent() is not scheduler:
            # Torch's modes belong to the thread. A run that entered some keeps them to itself.
            with modes_of_caller():
                scheduler.switch(block)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(call_before(block, wait))
        runs = [greenlets.greenlet(job) for job in jobs]
        # Where one fails, the others leave their modes now, and not whenever they are collected.
        stack.callback(lambda: [run.throw() for run in runs if not run.dead])
        # What a run hands over is the block it waits for or, at its end, its result.
        handed: dict[Any, Any] = {run: run.switch() for run in runs}
        while waiting := [run for run in runs if not run.dead]:
            block = handed[waiting[0]]
            with hold_weights(block):
                for run in waiting:
                    if handed[run] is block:
                        handed[run] = run.switch()
        return [handed[run] for run in runs]


def _modes_of_now() -> Callable[[], AbstractContextManager[None]]:
    """Return what puts this thread's grad, inference and autocast modes back for a while to what they are now."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    casts = [(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)) for device in DEVICES]
    has_cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def put_back() -> Iterator[None]:
        with ExitStack() as stack:
            # Inference mode first: it sets the grad mode too.
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype, is_enabled in casts:
                stack.enter_context(torch.autocast(device, dtype, is_enabled, has_cache))
            yield

    return put_back


def _import_greenlet() -> Any:
    try:
        import greenlet
    except ImportError:
        msg = "models larger than memory need the package greenlet: install actsparse[hub]"
        raise ActsparseError(msg) from None
    return greenlet
