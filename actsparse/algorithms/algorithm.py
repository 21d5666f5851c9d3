"""An algorithm: a score and an allocation, by name."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from actsparse.algorithms.allocations import ALLOCATIONS, AllocationName, uniform
from actsparse.algorithms.compensations import COMPENSATIONS, CompensationName, choose_compensations
from actsparse.algorithms.estimator import ThresholdEstimator
from actsparse.algorithms.groups import Scopes
from actsparse.algorithms.measurements import Measurements
from actsparse.algorithms.nncf_ema import NncfMovingAverage
from actsparse.algorithms.pooled_quantile import PooledQuantile
from actsparse.algorithms.scores import SCORES, ScoreName
from actsparse.errors import ActsparseError, nearest
from actsparse.mask import Compensation

# What takes the place of an allocation and of the pooled quantile: each layer gets its target, and one pass over the
# magnitudes of its input finds the threshold. To add one, write a `ThresholdEstimator` and name it here.
EstimatorName = Literal["nncf-ema"]
ESTIMATORS: dict[str, Callable[[tuple[float, ...]], ThresholdEstimator]] = {"nncf-ema": NncfMovingAverage}
# In the place of an allocation: only what is zero by itself is left out, which takes no data.
ZEROS = "zeros"
# What asks for masks of rows, behind a score and an allocation.
ROWS = "rows"
# What asks for the mean of what is left out, which is measured once the thresholds are known.
BIAS = "bias"


@dataclass(frozen=True)
class Plan:
    """
    What an algorithm decides before thresholds are calibrated.

    :param importance: Importance of each site, 0-d or [in_features]; 1 where there is none.
    :param zeros: How many entries each layer's mask leaves out; its sparsity, where a low-rank part needs no reads.
    :param compensations: What compensates for what is left out, by site.
    """

    sparsity: dict[str, float]
    importance: dict[str, torch.Tensor]
    zeros: dict[str, float]
    compensations: dict[str, Compensation]


@dataclass(frozen=True)
class Algorithm:
    """
    How thresholds are found.

    :param score: A name of `SCORES`.
    :param allocation: A name of `ALLOCATIONS` or `ESTIMATORS`, or `ZEROS`.
    :param rows: Whether, in gated feed-forward networks, rows of the up projection are masked, told by the gate, and
        not its input channels.
    :param compensation: A name of `COMPENSATIONS`, or `BIAS`; or nothing: what is left out becomes zero.
    :param name: What it is called in reports and files; by default what its string would be.
    :param candidates: Algorithms among which one is chosen by measurement, see `select`; empty for one that is what it
        says. The other fields are then those of the last candidate.
    """

    score: ScoreName
    allocation: AllocationName | EstimatorName | Literal["zeros"] = "uniform"
    rows: bool = False
    compensation: CompensationName | Literal["bias", ""] = ""
    name: str = field(default="", compare=False)
    candidates: tuple["Algorithm", ...] = ()

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("score", self.score, SCORES),
            ("allocation", self.allocation, [*ALLOCATIONS, *ESTIMATORS, ZEROS]),
            ("compensation", self.compensation, ["", *COMPENSATIONS, BIAS]),
        ):
            if name not in known:
                msg = f"unknown {kind} {name!r}; nearest: {nearest(name, known)}"
                raise ActsparseError(msg)
        if self.allocation in ESTIMATORS and (self.rows or self.compensation):
            option = ROWS if self.rows else self.compensation
            msg = f"{self.allocation} puts zeros into inputs: leave +{option} out"
            raise ActsparseError(msg)
        if self.allocation == ZEROS and self.compensation:
            msg = f"{ZEROS} leaves out zeros alone, for which nothing compensates: leave +{self.compensation} out"
            raise ActsparseError(msg)
        if self.allocation in (*ESTIMATORS, ZEROS) and self.score != "magnitude":
            msg = f"{self.allocation} sees magnitudes alone: it goes with the score magnitude, not {self.score}"
            raise ActsparseError(msg)
        if not self.name:
            options = [self.score, self.allocation, ROWS if self.rows else "", self.compensation]
            object.__setattr__(self, "name", "+".join(filter(None, options)))

    @property
    def is_one_pass(self) -> bool:
        """Whether thresholds can be calibrated at once, without measuring anything before."""
        is_plain = not self.rows and not self.compensation
        return self.score == "magnitude" and self.allocation in ("uniform", *ESTIMATORS) and is_plain

    @property
    def needs_data(self) -> bool:
        """Whether thresholds are calibrated."""
        return self.allocation != ZEROS

    def without_rows(self) -> "Algorithm":
        """
        Mask inputs alone.

        :return: The same algorithm otherwise, with the name that it then has.
        """
        return replace(self, rows=False, name=self.name.replace(f"+{ROWS}", ""))

    def make_estimator(self, targets: tuple[float, ...], importance: torch.Tensor | None) -> ThresholdEstimator:
        """
        Make the estimator of one site's thresholds.

        :param targets: The sparsities of the site's layers, each in (0, 1].
        :param importance: The importance a of the site, or None.
        """
        own = ESTIMATORS.get(self.allocation)
        return PooledQuantile(targets, importance) if own is None else own(targets)

    def plan(self, scopes: Scopes, model: Measurements) -> Plan:
        """Decide how sparse each layer becomes, and how important its channels are."""
        shared = [(target, groups) for target, groups in scopes if 0 < target < 1]
        sites = dict.fromkeys(group.site for _, groups in shared for group in groups)
        importance = {site: SCORES[self.score](model, site) for site in sites}
        # None and all leave nothing to decide.
        sparsity = uniform(scopes, model, importance)
        if shared:
            sparsity |= ALLOCATIONS[self.allocation](shared, model, importance)
        if not shared or self.compensation in ("", BIAS):
            return Plan(sparsity, importance, sparsity, {})
        chosen = choose_compensations(self.compensation, shared, sparsity, model, importance)
        return Plan(sparsity, importance, sparsity | chosen.zeros, chosen.compensations)
