"""
Compensations: what layers get in the place of what is left out.

A way to find them proposes some for each site; the one with the least output error is taken, and zeros are always among
what is tried. To add one, write a function of the sites and name it in `COMPENSATIONS` and
`CompensationName`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from actsparse.algorithms.groups import LayerGroup, Scopes
from actsparse.algorithms.measurements import Measurements, Trial
from actsparse.algorithms.r_sparse import low_ranks
from actsparse.algorithms.scap import shifts
from actsparse.mask import NO_COMPENSATION, Compensation

# Proposes what to try for each site, given its groups.
Propose = Callable[[Measurements, Mapping[str, list[LayerGroup]]], dict[str, list[Compensation]]]

CompensationName = Literal["shift", "low-rank"]
COMPENSATIONS: dict[str, Propose] = {"shift": shifts, "low-rank": low_ranks}


@dataclass(frozen=True)
class Chosen:
    """
    What was chosen for the sites of some scopes.

    :param zeros: How many entries are left out of each layer's input, so that what is read, for the compensation too,
        meets the layer's sparsity.
    """

    compensations: dict[str, Compensation]
    zeros: dict[str, float]


def choose_compensations(
    kind: str,
    scopes: Scopes,
    sparsity: Mapping[str, float],
    model: Measurements,
    importance: Mapping[str, torch.Tensor],
) -> Chosen:
    """
    Choose for each site what compensates for what is left out.

    :param kind: A name of `COMPENSATIONS`.
    """
    sites: dict[str, list[LayerGroup]] = {}
    for _, groups in scopes:
        for group in groups:
            # A row whose gate is closed has no input that anything could compensate for.
            if not group.is_of_rows:
                sites.setdefault(group.site, []).append(group)
    proposed = COMPENSATIONS[kind](model, sites)
    trials = [
        Trial(site, compensation, zeros)
        for site, groups in sites.items()
        for compensation in [NO_COMPENSATION, *proposed[site]]
        if (zeros := _zeros(groups, compensation, sparsity)) is not None
    ]
    best: dict[str, tuple[float, Trial]] = {}
    for trial, error in zip(trials, model.reconstruction_errors(trials, importance), strict=True):
        if trial.site not in best or error < best[trial.site][0]:
            best[trial.site] = (error, trial)
    chosen = [trial for _, trial in best.values()]
    return Chosen(
        {trial.site: trial.compensation for trial in chosen if trial.compensation != NO_COMPENSATION},
        {name: zeros for trial in chosen for name, zeros in trial.zeros.items()},
    )


def _zeros(
    groups: list[LayerGroup], compensation: Compensation, sparsity: Mapping[str, float]
) -> dict[str, float] | None:
    """Tell how much has to be left out of each layer's input, or None if that is all of it and more."""
    outputs, size = sum(group.outputs for group in groups), sum(group.weight_bytes for group in groups)
    reads = compensation.reads(groups[0].channels, outputs, size) if compensation.rank else 0.0
    zeros = {name: sparsity[name] + reads for group in groups for name in group.layers}
    return zeros if not reads or max(zeros.values()) < 1 else None
