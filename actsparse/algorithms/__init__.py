"""
The algorithms that turn activations into thresholds: a score, an allocation, or a name for a pair of them.

To use one::

    sparsify_activations(model, dataset, 0.5, algorithm="magnitude")
    sparsify_activations(model, dataset, 0.5, algorithm="layer-fisher+global")

Scores are in `scores.py`, allocations in `allocations.py`; each says how to add one.
"""

from actsparse.algorithms.algorithm import NNCF_EMA as NNCF_EMA
from actsparse.algorithms.algorithm import Algorithm as Algorithm
from actsparse.algorithms.algorithm import Plan as Plan
from actsparse.algorithms.allocations import ALLOCATIONS as ALLOCATIONS
from actsparse.algorithms.estimator import ThresholdEstimator as ThresholdEstimator
from actsparse.algorithms.measurements import Block as Block
from actsparse.algorithms.measurements import GradientSums as GradientSums
from actsparse.algorithms.measurements import Known as Known
from actsparse.algorithms.measurements import Measurements as Measurements
from actsparse.algorithms.measurements import name_sketches as name_sketches
from actsparse.algorithms.parts import Part as Part
from actsparse.algorithms.parts import gather_parts as gather_parts
from actsparse.algorithms.scores import SCORES as SCORES
from actsparse.errors import ActsparseError, nearest

ALGORITHMS: dict[str, tuple[str, str]] = {
    "magnitude": ("magnitude", "uniform"),
    "nncf": ("magnitude", NNCF_EMA),
    "wina": ("weight-norm", "uniform"),
    "teal": ("magnitude", "greedy"),
    "fisher": ("layer-fisher", "global"),
}


def get_algorithm(name: str) -> Algorithm:
    """
    Look up an algorithm.

    :param name: Its name, or SCORE+ALLOCATION.
    :return: The algorithm.
    :raises ActsparseError: If there is none of that name, or the two do not go together.
    """
    if isinstance(name, str) and name in ALGORITHMS:
        return Algorithm(name, *ALGORITHMS[name])
    if isinstance(name, str) and name.count("+") == 1:
        return Algorithm(name, *name.split("+"))
    known = [*ALGORITHMS, *(f"{score}+{allocation}" for score in SCORES for allocation in ALLOCATIONS)]
    msg = f"unknown algorithm {name!r}; nearest: {nearest(str(name), known)}"
    raise ActsparseError(msg)
