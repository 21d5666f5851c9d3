"""
The algorithms that turn activations into thresholds, by name.

To use one::

    sparsify_activations(model, dataset, 0.5, algorithm="magnitude")

To add one, write a class with the three members of `ThresholdEstimator` in a file of its own and name it below.
"""

from actsparse.algorithms.estimator import ThresholdEstimator as ThresholdEstimator
from actsparse.algorithms.magnitude import PooledQuantile
from actsparse.algorithms.nncf_ema import NncfMovingAverage
from actsparse.errors import ActsparseError, nearest

ALGORITHMS: dict[str, type[ThresholdEstimator]] = {
    "magnitude": PooledQuantile,
    "nncf": NncfMovingAverage,
}


def get_algorithm(name: str) -> type[ThresholdEstimator]:
    """
    Look up an algorithm.

    :param name: Its name.
    :return: The class that estimates thresholds.
    :raises ActsparseError: If there is none of that name.
    """
    algorithm = ALGORITHMS.get(name) if isinstance(name, str) else None
    if algorithm is None:
        msg = f"unknown algorithm {name!r}; nearest: {nearest(str(name), ALGORITHMS)}"
        raise ActsparseError(msg)
    return algorithm
