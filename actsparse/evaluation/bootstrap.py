"""Intervals for figures that are means over windows of text."""

import numpy as np

DRAWS = 2000


def bootstrap_interval(values: np.ndarray, weights: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """
    Draw windows with replacement and see how far their weighted mean moves.

    For a comparison, give the difference of each window: what makes a window hard then cancels.

    :param values: One value for each window.
    :param weights: Its weight, such as how many tokens it has.
    :return: The ends of the 95% interval.
    :raises ValueError: If there is no window.
    """
    return _interval(values * weights, weights, seed)


def bootstrap_ratio(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """
    Draw windows with replacement and see how far the ratio of two sums moves.

    :param numerators: One value for each window.
    :param denominators: The same windows' values of what is compared with.
    :return: The ends of the 95% interval.
    :raises ValueError: If there is no window.
    """
    return _interval(numerators, denominators, seed)


def _interval(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> tuple[float, float]:
    count = len(numerators)
    if count == 0:
        msg = "there are no windows to draw from"
        raise ValueError(msg)
    drawn = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    ratios = numerators[drawn].sum(1) / denominators[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
