"""
Allocations: how much each site gives to reach the target of its scope.

An allocation decides how sparse each site becomes; thresholds are calibrated afterwards, with the masks on. To add one,
write a function of the scopes and name it in `ALLOCATIONS` and `AllocationName`.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch

from actsparse.algorithms.attribution import attribution
from actsparse.algorithms.cett import cett
from actsparse.algorithms.greedy import greedy
from actsparse.algorithms.groups import Scopes
from actsparse.algorithms.measurements import Measurements
from actsparse.algorithms.perturbation import perturbation
from actsparse.algorithms.sharing import share_budget

# Gives each layer its sparsity, so that those of each scope reach its target together, by weight bytes.
Allocation = Callable[[Scopes, Measurements, Mapping[str, torch.Tensor]], dict[str, float]]


def uniform(scopes: Scopes, _model: Measurements, _importance: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Give every site the target itself."""
    return {name: target for target, groups in scopes for group in groups for name in group.layers}


def global_threshold(scopes: Scopes, model: Measurements, importance: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Leave out, over all sites of a scope, the entries whose score per weight byte is the smallest."""
    return share_budget(scopes, model.sketches(importance))


AllocationName = Literal["uniform", "global", "greedy", "cett", "attribution", "perturbation"]
ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "global": global_threshold,
    "greedy": greedy,
    "cett": cett,
    "attribution": attribution,
    "perturbation": perturbation,
}
