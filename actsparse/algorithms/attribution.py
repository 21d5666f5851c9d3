"""The attribution allocation: what each mask does to a model that is masked everywhere, by the gradient."""

from collections.abc import Mapping, Sequence

import torch

from actsparse.algorithms.groups import LayerGroup, Scopes
from actsparse.algorithms.measurements import Attribution, Measurements
from actsparse.algorithms.sharing import share_budget
from actsparse.algorithms.smoothing import smooth
from actsparse.algorithms.statistics import MagnitudeSketch

# Masks of rows are measured below the others. At equal sparsity the rows' masks leave out all that the down
# projection's would, whose own part could not be told.
FIRST_SHARE_OF_ROWS = 0.75
# How sparse the model is while it is measured, beside the target. Between what was best on two models at 50%: 0.8 on
# the default one, 1 on Gemma 3 270M.
MEASURED_SHARE = 0.9
# The gradients are taken on every other batch.
PART = (0, 2)
# The next entries to be left out, where the ones so far are zeros: which of those that are none, by their share.
SMALL = 0.05
# What a group's figure is at least, beside the usual one: masks that seem to do good are noise.
LEAST_FIGURE = 0.1


def attribution(scopes: Scopes, model: Measurements, importance: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """
    Give most to the groups whose masks do least, by the gradient, in a model that is masked everywhere.

    :param importance: The importance a of each site; only its ratios within a site matter.
    """
    return share_budget(scopes, model.sketches(importance), weigh_groups(scopes, model, importance))


def weigh_groups(
    scopes: Scopes, model: Measurements, importance: Mapping[str, torch.Tensor]
) -> dict[LayerGroup, float]:
    """
    Find out what leaving entries out of each group costs, per energy.

    One-at-a-time sensitivities miss what masks do to each other: a small error moves entries further on across their
    thresholds, and so grows. So all masks are put on, and the divergence from the dense model's predictions is shared
    among them: -g·(x - x̃), with g its gradient at what the mask lets through, sums up to twice the divergence if that
    is quadratic. The gradient passes the masks as if they were not there. Their own derivative, which is zero where
    they leave out, forgets the entries that cross the threshold; on average over those a mask hands on nearly all of a
    small change.

    In some models such sums are mostly noise: a few tokens, attention sinks above all, rule them. The first token of
    each sequence is left out of them. The rest is taken as what it is, a mean over batches with a standard error, and
    what cannot be told of a group is told by those of its role and depth.

    :return: The importance of each group: √(increase of the divergence / energy left out), of any unit within a scope.
    """
    sketches = model.sketches(importance)
    first = {group: share for target, groups in scopes for group, share in _first_shares(groups, target).items()}
    sparsity = {name: share for group, share in first.items() for name in group.layers}
    found = model.attributions(sparsity, importance, PART)
    weights: dict[LayerGroup, float] = {}
    for _, groups in scopes:
        # The next entries that a group would leave out cost a²τ², and save its cost in bytes.
        units = [find_threshold(sketches[group.site], first[group]) ** 2 / group.cost for group in groups]
        measured = [_measure([found[name] for name in group.layers]) for group in groups]
        values = torch.tensor([v * unit for (v, _), unit in zip(measured, units, strict=True)], dtype=torch.float64)
        errors = torch.tensor([e * unit for (_, e), unit in zip(measured, units, strict=True)], dtype=torch.float64)
        figures = smooth(groups, values, errors).clamp(min=LEAST_FIGURE)
        weights |= {p: (f / unit) ** 0.5 for p, f, unit in zip(groups, figures.tolist(), units, strict=True)}
    return weights


def find_threshold(sketch: MagnitudeSketch, share: float) -> float:
    """
    Find the size of the entries that a mask would leave out next.

    :return: The quantile; where that is zero, as behind a ReLU, a small one of what is not.
    """
    size = sketch.quantile(share)
    if size > 0:
        return size
    zeros = sketch.share(0.0)
    return max(sketch.quantile(zeros + SMALL * (1 - zeros)), 1e-30)


def _first_shares(groups: Sequence[LayerGroup], target: float) -> dict[LayerGroup, float]:
    target *= MEASURED_SHARE
    rows = sum(group.weight_bytes for group in groups if group.is_of_rows)
    others = sum(group.weight_bytes for group in groups if not group.is_of_rows)
    # Where much is to be left out, the others must not be left with nothing.
    first = max(FIRST_SHARE_OF_ROWS, 1 - (1 - target) * others / (2 * rows * target)) * target if rows else 0.0
    first = first if others else target
    rest = (target * (rows + others) - first * rows) / others if others else 0.0
    return {group: first if group.is_of_rows else rest for group in groups}


def _measure(layers: Sequence[Attribution]) -> tuple[float, float]:
    """Return the increase per energy of the layers of a group, which read one tensor, and its standard error."""
    energy = layers[0].energy
    if energy <= 0:
        return 0.0, float("inf")
    increases = torch.tensor([layer.increases for layer in layers], dtype=torch.float64).sum(0)
    count = len(increases)
    # One batch alone says nothing of its noise, which is then held to be as large as what it gives.
    error = float(increases.std() * count**0.5) if count > 1 else abs(float(increases.sum()))
    return float(increases.sum()) / energy, error / energy
