"""
The algorithms that turn activations into thresholds: a score and an allocation, or a name for a pair of them.

To use one::

    sparsify_activations(model, dataset, 0.5, algorithm="magnitude")
    sparsify_activations(model, dataset, 0.5, algorithm="layer-fisher+global")
    sparsify_activations(model, dataset, 0.5, algorithm="layer-fisher+global+rows")

    sparsify_activations(model, dataset, 0.5, algorithm="teal+low-rank")

``zeros`` leaves out what is zero by itself, behind ReLU and its kin; it takes no data::

    sparsify_activations(model, algorithm="zeros")

``auto`` tries several algorithms and takes the best; see `selection.py`. ``rows`` masks rows of up projections, told by
the gate, where the others mask their input channels; ``shift`` and ``low-rank`` put something else than zeros in the
place of what is left out, and ``bias`` adds its mean.

Scores are in `scores.py`, allocations in `allocations.py`, compensations in `compensations.py`; each says how to add
one.
"""

from actsparse.algorithms.algorithm import BIAS as BIAS
from actsparse.algorithms.algorithm import ESTIMATORS as ESTIMATORS
from actsparse.algorithms.algorithm import ROWS as ROWS
from actsparse.algorithms.algorithm import ZEROS as ZEROS
from actsparse.algorithms.algorithm import Algorithm as Algorithm
from actsparse.algorithms.algorithm import Plan as Plan
from actsparse.algorithms.allocations import ALLOCATIONS as ALLOCATIONS
from actsparse.algorithms.cache import MeasurementCache as MeasurementCache
from actsparse.algorithms.cache import name_measurement as name_measurement
from actsparse.algorithms.compensations import COMPENSATIONS as COMPENSATIONS
from actsparse.algorithms.estimator import ThresholdEstimator as ThresholdEstimator
from actsparse.algorithms.groups import LayerGroup as LayerGroup
from actsparse.algorithms.groups import gather_groups as gather_groups
from actsparse.algorithms.measurements import Attribution as Attribution
from actsparse.algorithms.measurements import Block as Block
from actsparse.algorithms.measurements import GradientSums as GradientSums
from actsparse.algorithms.measurements import Measurements as Measurements
from actsparse.algorithms.measurements import Movement as Movement
from actsparse.algorithms.measurements import Trial as Trial
from actsparse.algorithms.measurements import Trials as Trials
from actsparse.algorithms.measurements import take_part as take_part
from actsparse.algorithms.scores import SCORES as SCORES
from actsparse.algorithms.selection import HELD_OUT as HELD_OUT
from actsparse.algorithms.selection import Selection as Selection
from actsparse.algorithms.selection import Way as Way
from actsparse.algorithms.selection import select as select
from actsparse.errors import ActsparseError, nearest
from actsparse.mask import AUTO

# What `auto` chooses among, by measurement on batches held out.
CANDIDATES = ("magnitude", "magnitude+uniform+rows", "magnitude+attribution+rows", "magnitude+perturbation+rows")
ALGORITHMS = {
    "magnitude": "magnitude+uniform",
    AUTO: CANDIDATES[-1],
    "nncf": "magnitude+nncf-ema",
    "wina": "weight-norm+uniform",
    "teal": "magnitude+greedy",
    "cats": "gate+uniform+rows",
    "cett": "weight-norm+cett",
    "fisher": "layer-fisher+global",
    "scap": "magnitude+uniform+shift",
    "r-sparse": "weight-norm+uniform+low-rank",
    ZEROS: f"magnitude+{ZEROS}+rows",
}
# What may follow a score and an allocation.
OPTIONS = (ROWS, *COMPENSATIONS, BIAS)


def get_allocating_algorithm(name: str | Algorithm) -> Algorithm:
    """
    Look up an algorithm that reaches the sparsity that it is asked for.

    :raises ActsparseError: As `get_algorithm`, and for `ZEROS`.
    """
    algorithm = get_algorithm(name)
    if not algorithm.needs_data:
        msg = f"{algorithm.name} leaves out what is zero by itself: it has no sparsity to choose"
        raise ActsparseError(msg)
    return algorithm


def get_algorithm(name: str | Algorithm) -> Algorithm:
    """
    Look up an algorithm.

    :param name: Its name or SCORE+ALLOCATION, and behind that +rows, +shift, +low-rank, +bias; an algorithm is itself.
    :raises ActsparseError: If there is none of that name, or its parts do not go together.
    """
    if isinstance(name, Algorithm):
        return name
    parts = name.split("+") if isinstance(name, str) else []
    options = [part for part in parts if part in OPTIONS]
    base = "+".join(parts[: len(parts) - len(options)])
    expanded = [*ALGORITHMS.get(base, base).split("+"), *options]
    pair, options = expanded[:2], expanded[2:]
    if len(pair) != 2 or {*pair} & {"", *OPTIONS} or not {*options} <= {*OPTIONS} or len({*options}) != len(options):
        known = [*ALGORITHMS, *(f"{score}+{allocation}" for score in SCORES for allocation in ALLOCATIONS)]
        msg = f"unknown algorithm {name!r}; nearest: {nearest(str(name), known)}; behind it: +{', +'.join(OPTIONS)}"
        raise ActsparseError(msg)
    compensations = [option for option in options if option in (*COMPENSATIONS, BIAS)]
    if len(compensations) > 1:
        msg = f"{' and '.join(compensations)} exclude each other: one thing can compensate for what is left out"
        raise ActsparseError(msg)
    candidates = tuple(map(get_algorithm, CANDIDATES)) if base == AUTO else ()
    score, allocation = pair
    return Algorithm(score, allocation, ROWS in options, "".join(compensations), name, candidates)  # type: ignore[arg-type]
