"""How far the predictions move when one site alone is sparsified."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.runtime.progress import progress_bar
from actsparse.torch.measurements.probe import Probe
from actsparse.torch.running import evaluation_mode

# What a site gives up while its sensitivity is measured.
PROBE_SPARSITY = 0.5


def measure_sensitivities(probe: Probe, sketches: Mapping[str, MagnitudeSketch]) -> dict[str, float]:
    """
    Sparsify one site after the other.

    :return: For each site √(2 KL / energy): KL from the dense model's predictions, energy Σ x² left out, both over the
        first `PROBE_TOKENS` tokens.
    :raises ActsparseError: If the model gives no logits.
    """
    found = {}
    with evaluation_mode(probe.model), torch.no_grad(), probe.suspend():
        dense = [probe.log_probabilities(batch) for batch in probe.first_batches]
    with progress_bar("sensitivities", total=len(sketches), unit="sites") as advance:
        for site, sketch in sketches.items():
            found[site] = _measure_site(probe, site, sketch.quantile(PROBE_SPARSITY), dense)
            advance(1)
    return found


def _measure_site(probe: Probe, site: str, quantile: float, dense: list[torch.Tensor]) -> float:
    names = {layer.name for layer in probe.sites[site].layers}
    energy = divergence = 0.0

    def leave_out(name: str, x: torch.Tensor) -> torch.Tensor:
        nonlocal energy
        if name not in names:
            return x
        small = x.abs() <= quantile
        if name == site:
            energy += float((x.float() * small).square().sum())
        return x.masked_fill(small, 0.0)

    with evaluation_mode(probe.model), torch.no_grad(), probe.watch(leave_out):
        for batch, expected in zip(probe.first_batches, dense, strict=True):
            moved = probe.log_probabilities(batch)
            divergence += float(F.kl_div(moved, expected, reduction="sum", log_target=True))
    return (2 * max(divergence, 0.0) / max(energy, 1e-30)) ** 0.5
