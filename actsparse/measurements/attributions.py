"""What each mask does to the predictions of a model that is masked everywhere."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from actsparse import distributed
from actsparse.algorithms import Attribution
from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.calibration import blame_layer
from actsparse.insertion import watch_gradient
from actsparse.measurements.probe import Probe


def measure_attributions(
    probe: Probe, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor], batches: list[Any]
) -> dict[str, Attribution]:
    """
    Run the masked model forwards and backwards, each sequence masked at its own quantiles.

    What gradients are of is the loss the caller gave; else the divergence from the dense model's predictions.

    :param probe: The model.
    :param sparsity: The sparsity of each layer; those without one are left dense.
    :param importance: a of each site.
    :param batches: The data.
    :return: What each layer's mask does.
    :raises ActsparseError: If the model gives no logits, and there is no loss.
    """
    masks = _SequenceMasks(probe, sparsity, importance)
    sums = {layer.name: torch.zeros(3, dtype=torch.float64) for site in probe.sites.values() for layer in site.layers}

    def leave_out(name: str, x: torch.Tensor) -> torch.Tensor:
        dropped = x.detach() - masks.mask(name, x.detach())
        if sparsity.get(name, 0.0) <= 0:
            return x
        if torch.is_grad_enabled():
            scores = dropped.float() * importance[probe.sparsifiers[name].site].to(x.device)
            sums[name][2] += float(scores.square().sum(dtype=torch.float64))
        # The values of the masked tensor, and the gradient of x itself: see the attribution allocation.
        return watch_gradient(x - dropped, partial(_add_attribution, sums[name], dropped))

    def run(batch: Any) -> None:
        with torch.no_grad(), probe.suspend():
            dense = None if probe.loss is not None else probe.log_probabilities(batch)
        with torch.enable_grad(), probe.watch(leave_out):
            if dense is None:
                loss = probe.compute_loss(batch)
            else:
                loss = F.kl_div(probe.log_probabilities(batch), dense, reduction="sum", log_target=True)
            loss.backward()

    probe.run_backwards(run, distributed.share(batches), "attributing")
    distributed.add_up(*sums.values())
    return {name: Attribution(*totals.tolist()) for name, totals in sums.items()}


class _SequenceMasks:
    """Mask what each site reads at its own quantile, sequence by sequence, as thresholds are calibrated."""

    def __init__(self, probe: Probe, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor]) -> None:
        self._probe = probe
        self._sparsity = sparsity
        self._importance = importance
        self._wanted = {
            name: tuple(sorted({sparsity[x.name] for x in site.layers if sparsity.get(x.name, 0.0) > 0}))
            for name, site in probe.sites.items()
        }
        self._estimators: dict[str, PooledQuantile] = {}

    def mask(self, name: str, x: torch.Tensor) -> torch.Tensor:
        sparsifier = self._probe.sparsifiers[name]
        site, target = sparsifier.site, self._sparsity.get(name, 0.0)

        def mask_rest(rest: torch.Tensor) -> torch.Tensor:
            if name == site and self._wanted[site]:
                self._estimators[site] = PooledQuantile(self._wanted[site], self._importance[site])
                with blame_layer(name):
                    self._estimators[site].update(rest)
            return self._estimators[site].mask_batch(rest, target) if target > 0 else rest

        return sparsifier.mask_rest(x, mask_rest)


def _add_attribution(sums: torch.Tensor, dropped: torch.Tensor, g: torch.Tensor) -> None:
    by_channel = -(g.float() * dropped.float()).flatten(0, -2).sum(0, dtype=torch.float64).cpu()
    sums[0] += by_channel.sum()
    sums[1] += by_channel.abs().sum()
