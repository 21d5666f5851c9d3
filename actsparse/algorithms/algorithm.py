"""An algorithm: a score and an allocation, by name."""

from dataclasses import dataclass

import torch

from actsparse.algorithms.allocations import ALLOCATIONS, uniform
from actsparse.algorithms.estimator import ThresholdEstimator
from actsparse.algorithms.measurements import Measurements
from actsparse.algorithms.nncf_ema import NncfMovingAverage
from actsparse.algorithms.parts import Scopes
from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.algorithms.scores import SCORES
from actsparse.algorithms.stand_ins import STAND_INS, choose_stand_ins
from actsparse.errors import ActsparseError, nearest
from actsparse.stand_in import StandIn

# Its average of batch quantiles is an estimator of its own.
NNCF_EMA = "nncf-ema"
# What asks for masks of rows, behind a score and an allocation.
ROWS = "rows"


@dataclass(frozen=True)
class Plan:
    """
    What an algorithm decides before thresholds are calibrated.

    :param sparsity: The sparsity of each layer.
    :param importance: a of each site, 0-d or [in_features]; 1 where there is none.
    :param zeros: How many entries each layer's mask leaves out; its sparsity, where a low-rank part needs no reads.
    :param stand_ins: What stands in for what is left out, by site.
    """

    sparsity: dict[str, float]
    importance: dict[str, torch.Tensor]
    zeros: dict[str, float]
    stand_ins: dict[str, StandIn]


@dataclass(frozen=True)
class Algorithm:
    """
    How thresholds are found.

    :param name: What the caller said.
    :param score: A name of `SCORES`.
    :param allocation: A name of `ALLOCATIONS`, or nncf-ema.
    :param masks_rows: Whether, in gated feed-forward networks, rows of the up projection are masked, told by the gate,
        and not its input channels.
    :param stand_in: A name of `STAND_INS`, or nothing: what is left out becomes zero.
    :param candidates: Algorithms among which one is chosen by measurement, see `select`; empty for one that is what it
        says. The other fields are then those of the last candidate.
    """

    name: str
    score: str
    allocation: str
    masks_rows: bool = False
    stand_in: str = ""
    candidates: tuple["Algorithm", ...] = ()

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("score", self.score, SCORES),
            ("allocation", self.allocation, [*ALLOCATIONS, NNCF_EMA]),
            ("stand-in", self.stand_in, ["", *STAND_INS]),
        ):
            if name not in known:
                msg = f"unknown {kind} {name!r}; nearest: {nearest(name, known)}"
                raise ActsparseError(msg)
        if self.allocation == NNCF_EMA and (self.masks_rows or self.stand_in):
            option = ROWS if self.masks_rows else self.stand_in
            msg = f"{NNCF_EMA} is NNCF's own way, which puts zeros into inputs: leave +{option} out"
            raise ActsparseError(msg)
        if self.allocation == NNCF_EMA and self.score != "magnitude":
            msg = f"{NNCF_EMA} averages quantiles of magnitudes: it goes with the score magnitude, not {self.score}"
            raise ActsparseError(msg)

    @property
    def is_one_pass(self) -> bool:
        """Whether thresholds can be calibrated at once, without measuring anything before."""
        is_plain = not self.masks_rows and not self.stand_in
        return self.score == "magnitude" and self.allocation in ("uniform", NNCF_EMA) and is_plain

    def without_rows(self) -> "Algorithm":
        """
        Mask inputs alone.

        :return: The same algorithm otherwise, with the name that it then has.
        """
        return Algorithm(self.name.replace(f"+{ROWS}", ""), self.score, self.allocation, stand_in=self.stand_in)

    def make_estimator(self, targets: tuple[float, ...], importance: torch.Tensor | None) -> ThresholdEstimator:
        """
        Make the estimator of one site's thresholds.

        :param targets: The sparsities of the site's layers, each in (0, 1].
        :param importance: a of the site, or None.
        :return: The estimator.
        """
        return NncfMovingAverage(targets) if self.allocation == NNCF_EMA else PooledQuantile(targets, importance)

    def plan(self, scopes: Scopes, model: Measurements) -> Plan:
        """
        Decide how sparse each layer becomes and what its channels are worth.

        :param scopes: Target sparsity and parts of each scope.
        :param model: The model to measure.
        :return: The plan.
        """
        shared = [(target, parts) for target, parts in scopes if 0 < target < 1]
        sites = dict.fromkeys(part.site for _, parts in shared for part in parts)
        importance = {site: SCORES[self.score](model, site) for site in sites}
        # None and all leave nothing to decide.
        sparsity = uniform(scopes, model, importance)
        if shared:
            sparsity |= ALLOCATIONS[self.allocation](shared, model, importance)
        if not (shared and self.stand_in):
            return Plan(sparsity, importance, sparsity, {})
        chosen = choose_stand_ins(self.stand_in, shared, sparsity, model, importance)
        return Plan(sparsity, importance, sparsity | chosen.zeros, chosen.stand_ins)
