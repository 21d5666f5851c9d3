"""Intervals for figures that are means over windows of text."""

import numpy as np

DRAWS = 2000


def bootstrap_interval(values: np.ndarray, weights: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """
    Draw windows with replacement and see how far their weighted mean moves.

    For a comparison, give the difference of each window: what makes a window hard then cancels.

    :param values: One value for each window.
    :param weights: Its weight, such as how many tokens it has.
    :param seed: Of the draws.
    :return: The ends of the 95% interval.
    :raises ValueError: If there is no window.
    """
    if len(values) == 0:
        msg = "there are no windows to draw from"
        raise ValueError(msg)
    drawn = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    means = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
