"""What the outputs of activation functions are multiplied by."""

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from actsparse.calibration import require_seen
from actsparse.runtime import distributed
from actsparse.torch.insertion import record_calls
from actsparse.torch.measurements.probe import Probe


def measure_up_rms(probe: Probe) -> dict[str, torch.Tensor]:
    """
    Run forwards and see the outputs of the layers whose rows are masked.

    :return: For each of their sites the root mean square of each output, [out_features].
    :raises DatasetError: If no data went through one.
    """
    names = [name for name, site in probe.sites.items() if site.gate_function]
    totals = {name: torch.zeros(probe.channels(name), dtype=torch.float64) for name in names}
    tokens = dict.fromkeys(names, 0)

    def add(name: str, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
        rows = output.detach().float().flatten(0, -2)
        totals[name] += rows.square().sum(0, dtype=torch.float64).cpu()
        tokens[name] += len(rows)

    with probe.suspend(), ExitStack() as stack:
        for name in names:
            stack.enter_context(record_calls(probe.model.get_submodule(name), partial(add, name)))
        probe.run(distributed.share(probe.batches), "measuring")
    counts = torch.tensor(list(tokens.values()))
    distributed.add_up(counts, *totals.values())
    tokens = dict(zip(names, counts.tolist(), strict=True))
    require_seen(names, (name for name, count in tokens.items() if count))
    return {name: (total / tokens[name]).sqrt().float() for name, total in totals.items()}
