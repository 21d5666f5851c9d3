"""
Metrics: what a unit's output is worth to the token about to be generated (arXiv 2406.06562).

o is what the units of a layer put out at that token, g the gradient of the token's loss with respect to it, both
[..., units, width] with a width of 1 for neurons. Where g is negative, more of o makes the token likelier. The least
units by their score are switched off.
"""

from collections.abc import Callable

import torch

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Its gradient is averaged along the path from no output of the layer to its whole output.
INTEGRATED = "ig"


def magnitude(o: torch.Tensor, _g: torch.Tensor) -> torch.Tensor:
    """Take ‖o‖₂."""
    return o.norm(dim=-1)


def gradient(_o: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Take the mean of -g over a unit's entries."""
    return -g.mean(-1)


def gxo(o: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Take the mean of -g o (gradient times output): to first order, what the loss grows by without the unit."""
    return -(g * o).mean(-1)


def snip(o: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Take |mean of g o|."""
    return (g * o).mean(-1).abs()


def corrected_gxo(o: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Take GxO + ½ ‖o‖₂ ‖G‖₂, G being the means of g of all units of the layer: in the middle of what GxO may miss."""
    return gxo(o, g) + 0.5 * magnitude(o, g) * g.mean(-1).norm(dim=-1, keepdim=True)


METRICS: dict[str, Metric] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "gxo": gxo,
    "snip": snip,
    # Integrated gradients: GxO with the averaged gradient.
    INTEGRATED: gxo,
    "corrected-gxo": corrected_gxo,
}
