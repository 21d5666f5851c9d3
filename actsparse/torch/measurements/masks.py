"""Masks as they are while thresholds are calibrated: each sequence at its own quantile."""

from collections.abc import Mapping

import torch

from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.calibration import blame_layer
from actsparse.torch.measurements.probe import Probe

# A number that divides few widths, so that a sample of entries is one of all channels.
STRIDE = 5


class SequenceMasks:
    """
    Mask what each site reads at its own quantile, sequence by sequence.

    :param sparsity: The sparsity of each layer; those without one are left dense.
    """

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
        """Mask what a layer gets."""
        sparsifier = self._probe.sparsifiers[name]
        site, target = sparsifier.site, self._sparsity.get(name, 0.0)

        def mask_rest(rest: torch.Tensor) -> torch.Tensor:
            # The layers of a site read one tensor: the first one called is named after the site and counts for all.
            if name == site and self._wanted[site]:
                self._estimators[site] = PooledQuantile(self._wanted[site], self._importance[site], stride=STRIDE)
                with blame_layer(name):
                    self._estimators[site].update(rest)
            return self._estimators[site].mask_batch(rest, target) if target > 0 else rest

        return sparsifier.mask_rest(x, mask_rest)
