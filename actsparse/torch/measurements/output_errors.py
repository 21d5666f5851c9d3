"""How far the outputs of each site's layers move when more and more of their input is left out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from actsparse.calibration import run_each
from actsparse.mask import mask_small
from actsparse.torch.measurements.probe import Probe
from actsparse.torch.measurements.reconstruction_errors import ReconstructionErrors
from actsparse.torch.running import evaluation_mode, run_model
from actsparse.torch.wrappers import get_layer


def measure_output_errors(
    probe: Probe,
    importance: Mapping[str, torch.Tensor],
    quantiles: Mapping[str, Sequence[float]],
    up_rms: Mapping[str, torch.Tensor],
    batches: list[Any] | None = None,
) -> dict[str, list[float]]:
    """
    Leave out what does not exceed each of some quantiles of the scores, all other sites dense.

    :param up_rms: What each site's masked tensor is multiplied by, where rows are masked.
    :param batches: The data; None for the first `PROBE_TOKENS` tokens of the probe's.
    :return: For each site and quantile the mean over tokens of ‖what the outputs move by‖ / ‖outputs‖, without biases.
        Where rows are masked, outputs are the masked tensor times its up_rms.
    """
    errors = ReconstructionErrors()
    is_inside = False

    def multiply(name: str, x: torch.Tensor) -> torch.Tensor:
        nonlocal is_inside
        site = probe.sites[probe.sparsifiers[name].site]
        if is_inside or site.name not in quantiles:
            return x
        is_inside = True
        a = importance[site.name].to(x.device)
        inputs = [x, torch.zeros_like(x), *(mask_small(x, quantile / a) for quantile in quantiles[site.name])]
        if site.gate_function:
            # The layer has not run yet: in the place of its outputs, their usual size.
            outputs = [y.float() * up_rms[site.name].to(x.device) for y in inputs]
        else:
            layer = get_layer(probe.model, name)
            outputs = [layer(y).float() for y in inputs]
        is_inside = False
        whole, *moved = (outputs[0] - y for y in outputs[1:])
        errors.add(site.name, whole, moved)
        return x

    def run(batch: Any) -> None:
        run_model(probe.model, batch)
        errors.end_batch()

    batches = probe.first_batches if batches is None else batches
    with evaluation_mode(probe.model), torch.no_grad(), probe.watch(multiply):
        run_each(run, batches, total=len(batches), description="output errors")
    return {site: errors.means(site, len(found)) for site, found in quantiles.items()}
