"""The attribution allocation: what each mask does to a model that is masked everywhere, measured and evened out."""

import math
from collections.abc import Mapping, Sequence

import torch

from actsparse.algorithms.measurements import Attribution, Measurements
from actsparse.algorithms.parts import Part, Scopes
from actsparse.algorithms.sharing import share_budget

# Where the masks are when they are first measured: masks of rows below the others. At equal sparsity the rows' masks
# leave out all that the down projection's would, whose own part could not be told.
FIRST_SHARE_OF_ROWS = 0.75
ROUNDS = 2
# A part that gradients say costs nothing, or less, is taken for this share of what its noise amounts to.
LEAST_SHARE = 0.02


def attribution(scopes: Scopes, model: Measurements, importance: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """
    Give most to the parts whose masks are found to do least, in a model that is masked everywhere.

    One-at-a-time sensitivities miss what masks do to each other: a small error moves entries further on across their
    thresholds, and so grows. So all masks are put on, about as sparse as they will be, and the divergence from the
    dense model's predictions is shared among them: -g·(x - x̃), with g its gradient at what the mask lets through, sums
    up to twice the divergence if that is quadratic. The gradient passes the masks as if they were not there. Their own
    derivative, which is zero where they leave out, forgets the entries that cross the threshold; on average over those
    a mask hands on nearly all of a small change.

    Per energy left out, that gives each part its a; with all a, one threshold per weight byte is sought, as by
    `global_threshold`. Then all is measured again at the sparsities found, on the other half of the data, and the
    geometric mean of both is taken.

    :param scopes: Target sparsity and parts of each scope.
    :param model: The model.
    :param importance: a of each site; only its ratios within a site matter.
    :return: The sparsity of each layer.
    """
    sketches = model.sketches(importance)
    sparsity = {name: share for target, parts in scopes for name, share in _first_shares(parts, target).items()}
    logarithms: dict[Part, list[float]] = {part: [] for _, parts in scopes for part in parts}
    for number in range(ROUNDS):
        found = model.attributions(sparsity, importance, (number, ROUNDS))
        for part, measured in logarithms.items():
            layers = [found[name] for name in part.layers]
            if layers[0].energy > 0:
                measured.append(math.log(_worth(layers)))
        worth = _even_out(logarithms)
        sparsity = share_budget(scopes, sketches, worth)
    return sparsity


def _first_shares(parts: Sequence[Part], target: float) -> dict[str, float]:
    rows = sum(part.weight_bytes for part in parts if part.is_of_rows)
    others = sum(part.weight_bytes for part in parts if not part.is_of_rows)
    # Where much is to be left out, the others must not be left with nothing.
    first = max(FIRST_SHARE_OF_ROWS, 1 - (1 - target) * others / (2 * rows * target)) * target if rows else 0.0
    first = first if others else target
    rest = (target * (rows + others) - first * rows) / others if others else 0.0
    return {name: first if part.is_of_rows else rest for part in parts for name in part.layers}


def _worth(layers: Sequence[Attribution]) -> float:
    """Return √(increase / energy) of the layers of a part, which read one tensor."""
    increase = sum(layer.increase for layer in layers)
    noise = sum(layer.noise for layer in layers)
    return math.sqrt(max(increase, LEAST_SHARE * noise, 1e-30) / layers[0].energy)


def _even_out(logarithms: Mapping[Part, Sequence[float]]) -> dict[Part, float]:
    """Take geometric means; a part whose masks have left nothing out so far is taken for a usual one."""
    means = {part: sum(values) / len(values) for part, values in logarithms.items() if values}
    usual = sum(means.values()) / max(len(means), 1)
    return {part: math.exp(means.get(part, usual)) for part in logarithms}
