"""Gradients of the loss at what sites read, summed up."""

from functools import partial
from typing import Any

import torch

from actsparse.algorithms import GradientSums
from actsparse.calibration import require_seen
from actsparse.errors import DatasetError
from actsparse.runtime import distributed
from actsparse.torch.insertion import watch_gradient
from actsparse.torch.measurements.probe import Probe


def measure_gradients(probe: Probe) -> dict[str, GradientSums]:
    """
    Run the dense model forwards and backwards once for each batch.

    :raises ActsparseError: If there is no loss to take gradients of.
    :raises DatasetError: If a gradient is NaN or infinite; names the layer.
    """
    sums = {site: GradientSums(probe.channels(site)) for site in probe.sites}
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def take_gradient(name: str, x: torch.Tensor) -> torch.Tensor:
        site = probe.sparsifiers[name].site
        known = shared.get(site)
        if known is None or known[0] is not x:
            # The layers of a site are called one after the other: earlier sites' tensors need not be kept.
            shared.clear()
            shared[site] = known = (x, watch_gradient(x, partial(_add_gradient, sums[site], site, x.detach())))
        return known[1]

    def run(batch: Any) -> None:
        with torch.enable_grad():
            probe.compute_loss(batch).backward()
        shared.clear()

    with probe.watch(take_gradient):
        probe.run_backwards(run, distributed.share(probe.batches), "gradients")
    tokens = torch.tensor([totals.tokens for totals in sums.values()])
    distributed.add_up(tokens, *(vector for totals in sums.values() for vector in totals.vectors))
    for totals, count in zip(sums.values(), tokens.tolist(), strict=True):
        totals.tokens = count
    require_seen(probe.sites, (site for site, totals in sums.items() if totals.tokens))
    return sums


def _add_gradient(sums: GradientSums, site: str, x: torch.Tensor, g: torch.Tensor) -> None:
    if not torch.isfinite(g).all():
        msg = f"NaN or infinite gradients at the input of layer {site}"
        raise DatasetError(msg)
    sums.add(x, g)
