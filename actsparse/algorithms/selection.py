"""The choice among algorithms by measurement: what `auto` does."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from actsparse.algorithms.algorithm import Algorithm, Plan
from actsparse.algorithms.compensations import COMPENSATIONS
from actsparse.algorithms.groups import Scopes
from actsparse.algorithms.measurements import Measurements

# The batches that are held out: none of them is seen by what is chosen among.
HELD_OUT = (3, 4)


@dataclass(frozen=True)
class Way:
    """
    One algorithm, and what it is to be tried on.

    :param model: The model, with the masks that the algorithm needs.
    """

    algorithm: Algorithm
    scopes: Scopes
    model: Measurements


@dataclass(frozen=True)
class Selection:
    """
    What was tried and what was chosen.

    :param divergences: For each algorithm that was tried the divergence from the dense model's predictions on batches
        held out, KL(dense ‖ masked) in nats, a mean over tokens.
    :param losses: For each of them how much more a token of the text costs there, in nats; none where that is not
        known.
    """

    chosen: str
    divergences: dict[str, float]
    losses: dict[str, float]
    held_out: int

    def to_dict(self) -> dict[str, Any]:
        """Turn the selection into what JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {found:.4f}" for name, found in self.divergences.items())
        return f"{self.chosen}, by the divergence on {self.held_out} batches held out: {tried}"


def select(ways: Sequence[Way], compensation: str = "") -> tuple[Way, Plan, Selection]:
    """
    Plan with each algorithm, mask the model as each says, and take the one whose predictions stay nearest.

    Whatever assumptions an allocation makes, and on whatever model they fail, the choice is then not worse than the
    plainest of them, but for the noise of the batches held out.

    The divergence is told from few tokens, but where the dense model predicts its texts badly, as without the BOS that
    it was trained with, to stay near it is no merit. The text's own loss is what counts, and is noisy. So those are
    chosen among whose loss is within one standard error of the least, paired by batches (the rule of Breiman et al.,
    Classification and Regression Trees, 1984).

    :param ways: The algorithms; those that need the same masks share one model.
    :param compensation: What compensates for what is left out once shares are chosen, a name of
        `COMPENSATIONS`; or nothing.
    :return: The chosen one, its plan, and what was found.
    """
    plans = [way.algorithm.plan(way.scopes, way.model) for way in ways]
    count = ways[0].model.count_batches(HELD_OUT)
    found = np.empty((len(ways), count, 2))  # divergence and loss
    for model in dict.fromkeys(way.model for way in ways):
        numbers = [number for number, way in enumerate(ways) if way.model is model]
        trials = [[plans[number].sparsity for number in numbers]] * count
        movements = model.divergences(trials, plans[numbers[0]].importance, HELD_OUT)
        found[numbers] = np.array(movements).swapaxes(0, 1)
    divergences, losses = found.mean(1).T.tolist()
    best = min(_within_one_error(found[..., 1]), key=divergences.__getitem__)
    chosen = ways[best]
    names = [way.algorithm.name for way in ways]
    known = {} if any(map(math.isnan, losses)) else dict(zip(names, losses, strict=True))
    selection = Selection(names[best], dict(zip(names, divergences, strict=True)), known, count)
    plan = plans[best]
    if compensation in COMPENSATIONS:
        plan = replace(chosen.algorithm, compensation=compensation).plan(chosen.scopes, chosen.model)
    return chosen, plan, selection


def _within_one_error(losses: np.ndarray) -> list[int]:
    """Return the ways that lose about as little as any, by their losses, [ways, batches]."""
    batches = losses.shape[1]
    if batches < 2 or np.isnan(losses).any():
        return list(range(len(losses)))
    more = losses - losses[losses.mean(1).argmin()]
    errors = more.std(1, ddof=1) / batches**0.5
    return np.flatnonzero(more.mean(1) <= errors).tolist()
