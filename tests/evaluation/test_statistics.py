"""Error bars and comparisons against scipy, closed forms and brute force."""

import itertools

import numpy as np
import pytest
from scipy import stats

from flamingo_jax.evaluation import statistics as s

RNG = np.random.default_rng(0)
SCORES = RNG.random(200)


def test_a_mean_has_students_interval() -> None:
    found = s.mean_estimate(SCORES)
    error = stats.sem(SCORES)
    low, high = stats.t.interval(0.95, 199, SCORES.mean(), error)
    assert found == pytest.approx((SCORES.mean(), error, low, high))


def test_clusters_of_equal_items_count_once() -> None:
    alone = s.mean_estimate(SCORES)
    repeated = s.mean_estimate(np.repeat(SCORES, 7), np.repeat(np.arange(200), 7).tolist())
    assert repeated == pytest.approx(alone)


def test_the_clustered_error_is_that_of_its_formula() -> None:
    clusters = RNG.integers(0, 40, 200).tolist()
    mean = SCORES.mean()
    groups = sorted(set(clusters))
    sums = [sum(x - mean for x, c in zip(SCORES, clusters) if c == group) for group in groups]
    variance = len(groups) / (len(groups) - 1) * sum(x * x for x in sums) / 200**2
    assert s.mean_estimate(SCORES, clusters).standard_error == pytest.approx(variance**0.5)


def test_a_single_item_has_no_error() -> None:
    found = s.mean_estimate([0.5])
    assert found.score == 0.5 and np.isnan(found.standard_error)


def test_the_bootstrap_of_three_items_is_that_of_all_resamples() -> None:
    values = np.array([0.0, 1.0, 5.0])
    every = [np.mean(values[list(draw)]) for draw in itertools.product(range(3), repeat=3)]
    found = s.bootstrap_estimate(lambda counts: counts @ values / counts.sum(), 3, resamples=20_000)
    assert found.score == 2.0
    assert found.standard_error == pytest.approx(np.std(every), rel=0.03)
    # Each extreme has 1 of 27 resamples, more than the 2.5 % outside the interval.
    assert (found.low, found.high) == (min(every), max(every))


def test_the_bootstrap_of_a_mean_agrees_with_the_closed_form() -> None:
    clusters = RNG.integers(0, 60, 200).tolist()
    closed = s.mean_estimate(SCORES, clusters)
    drawn = s.bootstrap_estimate(
        lambda counts: counts @ SCORES / counts.sum(), 200, clusters, resamples=4000
    )
    assert drawn.score == pytest.approx(closed.score)
    assert drawn.standard_error == pytest.approx(closed.standard_error, rel=0.08)
    assert drawn.low == pytest.approx(closed.low, abs=0.3 * closed.standard_error)


def test_resamples_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> s.Estimate:
        return s.bootstrap_estimate(lambda counts: float(counts @ SCORES), 200, seed=seed)

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_paired_difference_is_the_paired_t_test() -> None:
    second = SCORES + RNG.normal(0.02, 0.1, 200)
    expected = stats.ttest_rel(second, SCORES)
    found = s.paired_difference(SCORES, second)
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert s.paired_difference(SCORES, SCORES).p == 1.0


def test_a_paired_bootstrap_sees_what_the_t_test_sees() -> None:
    second = SCORES + RNG.normal(0.02, 0.1, 200)
    closed = s.paired_difference(SCORES, second)

    def mean(values: np.ndarray) -> s.Statistic:
        return lambda counts: counts @ values / counts.sum()

    found = s.paired_bootstrap(mean(SCORES), mean(second), 200, resamples=4000)
    assert found.difference == pytest.approx(closed.difference)
    assert found.standard_error == pytest.approx(closed.standard_error, rel=0.08)
    assert found.p == pytest.approx(closed.p, abs=0.02)
    assert s.paired_bootstrap(mean(SCORES), mean(SCORES), 200).p == 1.0


def test_seeds_have_a_spread() -> None:
    found = s.seed_spread([0.5, 0.6, 0.7])
    assert (found.mean.score, found.deviation) == pytest.approx((0.6, 0.1))
    assert (found.lowest, found.highest) == (0.5, 0.7)
    reach = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert found.mean.high == pytest.approx(0.6 + reach)


def test_runs_of_unequal_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        s.paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="clusters"):
        s.mean_estimate([1.0, 2.0], ["a"])
