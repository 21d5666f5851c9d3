"""What the outputs of activation functions are multiplied by."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from actsparse.insertion import record_calls
from actsparse.measurements.probe import Probe, require_seen


def measure_multipliers(probe: Probe) -> dict[str, torch.Tensor]:
    """
    Run forwards and see the outputs of the layers whose rows are masked.

    :param probe: The model.
    :return: For each of their sites the root mean square of each output, [out_features].
    :raises DatasetError: If no data went through one.
    """
    names = [name for name, site in probe.sites.items() if site.gate_function]
    totals: dict[str, tuple[torch.Tensor, int]] = {}

    def add(name: str, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
        total, tokens = totals.get(name, (torch.zeros((), dtype=torch.float64), 0))
        rows = output.detach().float().flatten(0, -2)
        totals[name] = total + rows.square().sum(0, dtype=torch.float64).cpu(), tokens + len(rows)

    with probe.suspend(), ExitStack() as stack:
        for name in names:
            stack.enter_context(record_calls(probe.model.get_submodule(name), partial(add, name)))
        probe.run(probe.batches, "measuring")
    require_seen(names, (name for name, (_, tokens) in totals.items() if tokens))
    return {name: (total / tokens).sqrt().float() for name, (total, tokens) in totals.items()}
