"""The choice among algorithms by measurement: what `auto` does."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from actsparse.algorithms.algorithm import Algorithm, Plan
from actsparse.algorithms.measurements import Measurements
from actsparse.algorithms.parts import Scopes

# The batches that are held out: none of them is seen by what is chosen among.
HELD_OUT = (3, 4)


@dataclass(frozen=True)
class Way:
    """
    One algorithm, and what it is to be tried on.

    :param algorithm: The algorithm, without a stand-in.
    :param scopes: Target sparsity and parts of each scope.
    :param model: The model, with the masks that the algorithm needs.
    """

    algorithm: Algorithm
    scopes: Scopes
    model: Measurements


@dataclass(frozen=True)
class Selection:
    """
    What was tried and what was chosen.

    :param chosen: The algorithm that was taken.
    :param divergences: For each algorithm that was tried the divergence from the dense model's predictions on batches
        held out, KL(dense ‖ masked) in nats, a mean over tokens.
    :param held_out: How many batches those are.
    """

    chosen: str
    divergences: dict[str, float]
    held_out: int

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the selection into what JSON can hold.

        :return: Its fields.
        """
        return asdict(self)

    def __str__(self) -> str:
        tried = ", ".join(f"{name} {found:.4f}" for name, found in self.divergences.items())
        return f"{self.chosen}, by the divergence on {self.held_out} batches held out: {tried}"


def select(ways: Sequence[Way], stand_in: str = "") -> tuple[Way, Plan, Selection]:
    """
    Plan with each algorithm, mask the model as each says, and take the one whose predictions stay nearest.

    Whatever assumptions an allocation makes, and on whatever model they fail, the choice is then not worse than the
    plainest of them, but for the noise of the batches held out.

    :param ways: The algorithms; those that need the same masks share one model.
    :param stand_in: What is to stand in for what is left out once shares are chosen, a name of `STAND_INS`; or nothing.
    :return: The chosen one, its plan, and what was found.
    """
    plans = [way.algorithm.plan(way.scopes, way.model) for way in ways]
    divergences = [0.0] * len(ways)
    count = ways[0].model.count_batches(HELD_OUT)
    for model in dict.fromkeys(way.model for way in ways):
        numbers = [number for number, way in enumerate(ways) if way.model is model]
        trials = [[plans[number].sparsity for number in numbers]] * count
        found = model.divergences(trials, plans[numbers[0]].importance, HELD_OUT)
        for column, number in enumerate(numbers):
            divergences[number] = sum(row[column] for row in found) / count
    best = min(range(len(ways)), key=divergences.__getitem__)
    chosen = ways[best]
    names = [way.algorithm.name for way in ways]
    selection = Selection(names[best], dict(zip(names, divergences, strict=True)), count)
    plan = plans[best]
    if stand_in:
        plan = replace(chosen.algorithm, stand_in=stand_in).plan(chosen.scopes, chosen.model)
    return chosen, plan, selection
