"""Runs side by side: each is as if it were alone."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from actsparse.torch.blockwise import DEVICES, run_blockwise

Enter = Callable[[], AbstractContextManager[Any]]
MODES: list[Enter] = [
    nullcontext,
    torch.no_grad,
    partial(torch.autocast, "cpu", torch.bfloat16),
    partial(torch.autocast, "cpu", torch.float16, cache_enabled=False),
    torch.inference_mode,
    torch.enable_grad,
    partial(torch.autocast, "cpu", enabled=False),
    partial(torch.inference_mode, mode=False),
]


def modes() -> tuple[Any, ...]:
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled(), *casts


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        seen.append(modes())
        y = self.layer(x)
        seen.append((y.dtype, y.is_inference(), y.requires_grad))
        return y


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor, seen: list[Any]) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, seen)
        return x


def make_model() -> nn.Module:
    return cpu_offload(Stack(), torch.device("cpu"))


def run(model: nn.Module, enter: Enter) -> list[Any]:
    seen: list[Any] = [modes()]
    with enter():
        model(torch.ones(1, 4), seen)
        seen.append(modes())
    return [*seen, modes()]


@pytest.mark.parametrize("outer", MODES)
def test_each_run_and_the_caller_have_their_own_modes(outer: Enter) -> None:
    model = make_model()
    before = modes()
    with outer():
        inside = modes()
        expected = [run(model, enter) for enter in MODES]
        # Each mode twice, in another order: runs end in the order in which they began.
        jobs = [partial(run, model, enter) for enter in (*MODES, *reversed(MODES))]
        assert run_blockwise(model, jobs) == [*expected, *reversed(expected)]
        assert modes() == inside
    assert modes() == before


def test_runs_that_are_given_up_leave_no_mode_behind() -> None:
    model = make_model()
    before = modes()

    def fail() -> None:
        with torch.autocast("cpu"):
            model(torch.ones(1, 5), [])

    def attempt() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            run_blockwise(
                model, [*(partial(run, model, enter) for enter in MODES), fail, partial(run, model, MODES[2])]
            )

    with pytest.raises(RuntimeError) as caught:
        attempt()
    assert modes() == before
    del caught
    gc.collect()
    assert modes() == before
