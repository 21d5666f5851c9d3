"""
Allocations: how much each site gives to reach the target of its scope.

An allocation decides how sparse each site becomes; thresholds are calibrated afterwards, with the masks on. To add one,
write a function of the parts of one scope and name it in `ALLOCATIONS`.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from actsparse.algorithms.greedy import greedy
from actsparse.algorithms.measurements import Measurements
from actsparse.algorithms.parts import Part

# Thresholds are found to one part in 2^60 of their range.
BISECTIONS = 60


# Gives each layer of a scope its sparsity, so that together they reach the target by weight bytes.
Allocation = Callable[[Sequence[Part], float, Measurements, Mapping[str, torch.Tensor]], dict[str, float]]


def uniform(
    parts: Sequence[Part], target: float, _model: Measurements, _importance: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Give every site the target itself."""
    return _by_layer(parts, [target] * len(parts))


def global_threshold(
    parts: Sequence[Part], target: float, model: Measurements, importance: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """
    Leave out, over all sites, the entries whose score per weight byte is the smallest.

    If leaving x_j out costs ½ (a_j x_j)² and saves as many bytes as the channel's weights have, the cheapest way to
    save bytes is one threshold for a_j |x_j| / √cost.
    """
    sketches = model.sketches(importance)
    low, high = 0.0, max(sketches[part.site].quantile(1.0) / part.cost**0.5 for part in parts)
    total = sum(part.weight_bytes for part in parts)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        shares = [sketches[part.site].share(middle * part.cost**0.5) for part in parts]
        saved = sum(part.weight_bytes * share for part, share in zip(parts, shares, strict=True))
        low, high = (middle, high) if saved < target * total else (low, middle)
    return _by_layer(parts, [sketches[part.site].share(high * part.cost**0.5) for part in parts])


def _by_layer(parts: Sequence[Part], shares: Sequence[float]) -> dict[str, float]:
    return {name: share for part, share in zip(parts, shares, strict=True) for name in part.layers}


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "global": global_threshold, "greedy": greedy}
