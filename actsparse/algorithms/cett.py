"""The CETT allocation of Sparsing Law (arXiv 2411.02335): the same relative output error for every layer."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from actsparse.algorithms.groups import LayerGroup, Scopes
from actsparse.algorithms.measurements import Measurements
from actsparse.algorithms.sharing import bisect_shares

# The sparsities at which a layer's error is measured; in between it is taken for linear.
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def cett(scopes: Scopes, model: Measurements, importance: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """
    Find the one error c that all layers of a scope may make, and how sparse each gets with it.

    A layer's error is the mean over tokens of ‖Σ x_j w_j over what is left out‖ / ‖Σ x_j w_j over all‖.
    """
    errors = {site: np.maximum.accumulate(curve) for site, curve in model.output_errors(importance, GRID).items()}
    sparsity: dict[str, float] = {}
    for target, groups in scopes:

        def shares(error: float, groups: Sequence[LayerGroup] = groups) -> list[float]:
            return [float(np.interp(error, errors[group.site], GRID)) for group in groups]

        sparsity |= bisect_shares(groups, target, shares, 1.0)
    return sparsity
