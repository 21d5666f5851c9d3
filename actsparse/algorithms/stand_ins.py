"""
Stand-ins: what layers get in the place of what is left out.

A way to find them proposes some for each site; the one with the least output error is taken, and zeros are always among
what is tried. To add one, write a function of the sites and name it in `STAND_INS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from actsparse.algorithms.measurements import Measurements, Trial
from actsparse.algorithms.parts import Part, Scopes
from actsparse.algorithms.r_sparse import low_ranks
from actsparse.algorithms.scap import shifts
from actsparse.stand_in import NOTHING, StandIn

# Proposes what to try for each site, given its parts.
Propose = Callable[[Measurements, Mapping[str, list[Part]]], dict[str, list[StandIn]]]

STAND_INS: dict[str, Propose] = {"shift": shifts, "low-rank": low_ranks}


@dataclass(frozen=True)
class Chosen:
    """
    What was chosen for the sites of some scopes.

    :param stand_ins: By site; nothing where zeros do best.
    :param zeros: How many entries are left out of each layer's input, so that what is read, for the stand-in too, meets
        the layer's sparsity.
    """

    stand_ins: dict[str, StandIn]
    zeros: dict[str, float]


def choose_stand_ins(
    kind: str,
    scopes: Scopes,
    sparsity: Mapping[str, float],
    model: Measurements,
    importance: Mapping[str, torch.Tensor],
) -> Chosen:
    """
    Choose for each site what stands in for what is left out.

    :param kind: A name of `STAND_INS`.
    :param scopes: Target sparsity and parts of each scope.
    :param sparsity: The sparsity of each layer.
    :param model: The model.
    :param importance: a of each site.
    :return: The best of what was tried.
    """
    sites: dict[str, list[Part]] = {}
    for _, parts in scopes:
        for part in parts:
            # A row whose gate is closed has no input that anything could stand in for.
            if not part.is_of_rows:
                sites.setdefault(part.site, []).append(part)
    proposed = STAND_INS[kind](model, sites)
    trials = [
        Trial(site, stand_in, zeros)
        for site, parts in sites.items()
        for stand_in in [NOTHING, *proposed[site]]
        if (zeros := _zeros(parts, stand_in, sparsity)) is not None
    ]
    best: dict[str, tuple[float, Trial]] = {}
    for trial, error in zip(trials, model.trial_errors(trials, importance), strict=True):
        if trial.site not in best or error < best[trial.site][0]:
            best[trial.site] = (error, trial)
    chosen = [trial for _, trial in best.values()]
    return Chosen(
        {trial.site: trial.stand_in for trial in chosen if trial.stand_in != NOTHING},
        {name: zeros for trial in chosen for name, zeros in trial.zeros.items()},
    )


def _zeros(parts: list[Part], stand_in: StandIn, sparsity: Mapping[str, float]) -> dict[str, float] | None:
    """Tell how much has to be left out of each layer's input, or None if that is all of it and more."""
    outputs, size = sum(part.outputs for part in parts), sum(part.weight_bytes for part in parts)
    reads = stand_in.reads(parts[0].channels, outputs, size) if stand_in.rank else 0.0
    zeros = {name: sparsity[name] + reads for part in parts for name in part.layers}
    return zeros if not reads or max(zeros.values()) < 1 else None
