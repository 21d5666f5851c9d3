"""
The algorithms that turn activations into thresholds: a score and an allocation, or a name for a pair of them.

To use one::

    sparsify_activations(model, dataset, 0.5, algorithm="magnitude")
    sparsify_activations(model, dataset, 0.5, algorithm="layer-fisher+global")
    sparsify_activations(model, dataset, 0.5, algorithm="layer-fisher+global+rows")

The last one masks rows of up projections, told by the gate, where the others mask their input channels.

Scores are in `scores.py`, allocations in `allocations.py`; each says how to add one.
"""

from actsparse.algorithms.algorithm import NNCF_EMA as NNCF_EMA
from actsparse.algorithms.algorithm import ROWS as ROWS
from actsparse.algorithms.algorithm import Algorithm as Algorithm
from actsparse.algorithms.algorithm import Plan as Plan
from actsparse.algorithms.allocations import ALLOCATIONS as ALLOCATIONS
from actsparse.algorithms.estimator import ThresholdEstimator as ThresholdEstimator
from actsparse.algorithms.measurements import Attribution as Attribution
from actsparse.algorithms.measurements import Block as Block
from actsparse.algorithms.measurements import GradientSums as GradientSums
from actsparse.algorithms.measurements import Known as Known
from actsparse.algorithms.measurements import Measurements as Measurements
from actsparse.algorithms.measurements import name_sketches as name_sketches
from actsparse.algorithms.parts import Part as Part
from actsparse.algorithms.parts import gather_parts as gather_parts
from actsparse.algorithms.scores import SCORES as SCORES
from actsparse.errors import ActsparseError, nearest

ALGORITHMS = {
    "magnitude": "magnitude+uniform",
    "auto": "magnitude+attribution+rows",
    "nncf": f"magnitude+{NNCF_EMA}",
    "wina": "weight-norm+uniform",
    "teal": "magnitude+greedy",
    "cats": "gate+uniform+rows",
    "cett": "weight-norm+cett",
    "fisher": "layer-fisher+global",
}


def get_algorithm(name: str) -> Algorithm:
    """
    Look up an algorithm.

    :param name: Its name, SCORE+ALLOCATION, or SCORE+ALLOCATION+rows.
    :return: The algorithm.
    :raises ActsparseError: If there is none of that name, or the two do not go together.
    """
    parts = ALGORITHMS.get(name, name).split("+") if isinstance(name, str) else []
    if len(parts) == 3 and parts[2] == ROWS:
        return Algorithm(name, parts[0], parts[1], masks_rows=True)
    if len(parts) == 2:
        return Algorithm(name, parts[0], parts[1])
    known = [*ALGORITHMS, *(f"{score}+{allocation}" for score in SCORES for allocation in ALLOCATIONS)]
    msg = f"unknown algorithm {name!r}; nearest: {nearest(str(name), known)}"
    raise ActsparseError(msg)
