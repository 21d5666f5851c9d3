"""
Scores: how much an entry of a masked tensor matters.

A score is a fixed importance a for every channel: entries with a small a_j |x_j| are left out. That is all that a
static threshold can express, whatever the score is derived from. Where rows are masked, x is the output of the
activation function, and what it is multiplied by is part of an entry's importance.

To add one, write a function from a site to its importance and name it in `SCORES` and `ScoreName`. It may ask for
anything that `Measurements` has; what it does not ask for is not measured.
"""

from collections.abc import Callable
from typing import Literal

import torch

from actsparse.algorithms.measurements import Measurements

# Of a channel, beside the mean of its site.
LEAST_IMPORTANCE = 1e-3

Importance = Callable[[Measurements, str], torch.Tensor]


def magnitude(model: Measurements, site: str) -> torch.Tensor:
    """Take channels alike; where rows are masked, by the size of what they are multiplied by (arXiv 2409.01366)."""
    return model.up_rms(site)


def gate(_model: Measurements, _site: str) -> torch.Tensor:
    """Take channels alike, whatever they are multiplied by (CATS, arXiv 2404.08763)."""
    return torch.ones(())


def weight_norm(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a channel by the norm of its weights: what the output loses without it (WINA, arXiv 2505.19427)."""
    return model.weight_norms(site).float()


def fisher(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a channel by √E[g²]: a second-order estimate of what leaving x out costs is ½ E[g²] x²."""
    sums = model.gradients()[site]
    return (sums.square / sums.tokens).sqrt().float()


def layer_fisher(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a site by the mean of √E[g²] over its channels, without the noise that single channels have."""
    return fisher(model, site).mean() * _relative_up_rms(model, site)


def measured(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a site by how far the model's predictions move when it alone is sparsified."""
    return model.sensitivities()[site] * _relative_up_rms(model, site)


def gradient(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a channel by E|g|."""
    sums = model.gradients()[site]
    return (sums.absolute / sums.tokens).float()


def gxo(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a channel by E[-g x] / E|x|, where it is positive (gradient times output)."""
    return _per_magnitude(model, site, "attribution")


def snip(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a channel by E|g x| / E|x| (SNIP)."""
    return _per_magnitude(model, site, "saliency")


def corrected_gxo(model: Measurements, site: str) -> torch.Tensor:
    """Weigh a channel by E[-g x + ½ |x| ‖g‖] / E|x| (arXiv 2406.06562, averaged over tokens)."""
    return _per_magnitude(model, site, "attribution", "correction")


def _relative_up_rms(model: Measurements, site: str) -> torch.Tensor:
    up_rms = model.up_rms(site)
    return up_rms / up_rms.mean()


def _per_magnitude(model: Measurements, site: str, *names: str) -> torch.Tensor:
    sums = model.gradients()[site]
    total = sum(getattr(sums, name) for name in names)
    ratio = torch.where(sums.magnitude > 0, total / sums.magnitude.clamp(min=1e-300), 0.0)
    # Channels whose loss falls when they are left out go first, but by magnitude: were they all worth nothing, more of
    # them could be left out than were asked for.
    floor = LEAST_IMPORTANCE * ratio.abs().mean()
    return ratio.clamp(min=float(floor.clamp(min=1e-30))).float()


def geometric_mean(*weighted: tuple[Importance, float]) -> Importance:
    """Blend scores: shrinkage of a noisy one towards a steady one."""

    def importance(model: Measurements, site: str) -> torch.Tensor:
        product = torch.ones(())
        for part, exponent in weighted:
            product = product * part(model, site) ** exponent
        return product

    return importance


ScoreName = Literal[
    "magnitude",
    "gate",
    "weight-norm",
    "fisher",
    "layer-fisher",
    "measured",
    "gradient",
    "gxo",
    "snip",
    "corrected-gxo",
    "fisher-blend",
]
SCORES: dict[str, Importance] = {
    "magnitude": magnitude,
    "gate": gate,
    "weight-norm": weight_norm,
    "fisher": fisher,
    "layer-fisher": layer_fisher,
    "measured": measured,
    "gradient": gradient,
    "gxo": gxo,
    "snip": snip,
    "corrected-gxo": corrected_gxo,
    "fisher-blend": geometric_mean((layer_fisher, 0.7), (fisher, 0.3)),
}
