import numpy as np
import pytest

from actsparse.evaluation.bootstrap import bootstrap_interval, bootstrap_ratio


def test_the_interval_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.normal(3, 2, 400), np.ones(400)
    low, high = bootstrap_interval(values, weights)
    # 1.96 standard errors on both sides.
    assert low == pytest.approx(values.mean() - 0.196, abs=0.03)
    assert high == pytest.approx(values.mean() + 0.196, abs=0.03)


def test_it_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(0, 1, 30), np.ones(30))
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_weights_count_windows_that_often() -> None:
    values = np.array([1.0, 1.0, 1.0, 5.0])
    light = bootstrap_interval(values, np.array([1.0, 1.0, 1.0, 0.01]))
    heavy = bootstrap_interval(values, np.array([1.0, 1.0, 1.0, 100.0]))
    assert light[0] == heavy[0] == 1.0
    assert light[1] < 1.2
    assert heavy[1] > 4.9


def test_equal_seeds_give_equal_intervals() -> None:
    values = np.random.default_rng(3).normal(size=20)
    assert bootstrap_interval(values, np.ones(20), seed=5) == bootstrap_interval(values, np.ones(20), seed=5)
    assert bootstrap_interval(values, np.ones(20), seed=5) != bootstrap_interval(values, np.ones(20), seed=6)


def test_nothing_has_no_interval() -> None:
    with pytest.raises(ValueError, match="no windows"):
        bootstrap_interval(np.zeros(0), np.zeros(0))


def test_the_ratio_of_windows_that_go_together_is_sharp() -> None:
    rng = np.random.default_rng(4)
    windows = rng.uniform(1, 10, 50)
    low, high = bootstrap_ratio(0.6 * windows + rng.normal(0, 0.1, 50), windows)
    assert low < 0.6 < high
    assert high - low < 0.03
    apart = bootstrap_ratio(0.6 * rng.permutation(windows), windows)
    assert apart[1] - apart[0] > 5 * (high - low)
