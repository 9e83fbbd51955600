"""Error bars of scores: standard errors and intervals, their spread over seeds, and whether one
run is better than another.

Several questions about one image do not count as independent: give their image as `clusters`.
All functions are deterministic for a seed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
_CHUNK = 1 << 24
"""Counts that are drawn at once, to bound memory."""

Statistic = Callable[[np.ndarray], float]
"""How often each item is drawn, int [items] -> the score of the drawn items."""


class Estimate(NamedTuple):
    """A score with its standard error and confidence interval."""

    score: float
    standard_error: float
    low: float
    high: float


class RunDifference(NamedTuple):
    """The difference of two runs on the same items: second less first.

    p: two-sided, the probability of such a difference where there is none.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    p: float


class Spread(NamedTuple):
    """Scores of several seeds: their mean with its interval, deviation and extremes.

    deviation: the sample standard deviation, of a seed.
    """

    mean: Estimate
    deviation: float
    lowest: float
    highest: float


def mean_estimate(
    scores: Sequence[float] | np.ndarray,
    clusters: Sequence[object] | None = None,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """Estimates a mean with its standard error, in closed form, and the interval by Student's t.

    Args:
      scores: [items], at least one.
      clusters: what each item belongs to, such as its image; items of one cluster may depend on
        each other. By default each is alone. The error is that of the cluster-robust estimator
        (Liang and Zeger 1986) with the factor G / (G - 1) for G clusters.
      confidence: of the interval.

    Returns: the estimate; error and interval are NaN for a single item or cluster.
    """
    values = np.asarray(scores, np.float64)
    mean = float(values.mean())
    sums = np.bincount(_numbers(clusters, len(values)), values - mean)
    groups = len(sums)
    if groups < 2:
        return Estimate(mean, np.nan, np.nan, np.nan)
    error = float(np.sqrt(groups / (groups - 1) * np.sum(sums**2)) / len(values))
    reach = _t_quantile(groups - 1, confidence) * error
    return Estimate(mean, error, mean - reach, mean + reach)


def bootstrap_estimate(
    statistic: Statistic,
    items: int,
    clusters: Sequence[object] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """Estimates a score that is no mean of items, such as BLEU of a corpus or an area under the
    ROC curve, with its error over resamples of items or clusters (Efron 1979).

    Args:
      statistic: the score of items drawn so many times each; a NaN is left out.
      items: their number.
      clusters: what each item belongs to; all of a cluster are drawn together.
      resamples: number of resamples.
      confidence: of the interval between percentiles.
      seed: of the resamples.
    """
    drawn = np.array(
        [statistic(counts) for counts in _draws(items, clusters, resamples, seed)], np.float64
    )
    low, high = _percentiles(drawn, confidence)
    score = float(statistic(np.ones(items, np.int64)))
    return Estimate(score, float(np.nanstd(drawn, ddof=1)), low, high)


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[object] | None = None,
    confidence: float = CONFIDENCE,
) -> RunDifference:
    """Compares the means of two runs on the same items, by the t test of their differences.

    Args:
      first, second: scores [items] in the same order.
      clusters: see `mean_estimate`.

    Raises: ValueError if there are not equally many.
    """
    if len(first) != len(second):
        raise ValueError(f"runs of {len(first)} and {len(second)} items cannot be paired")
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    estimate = mean_estimate(differences, clusters, confidence)
    groups = len(np.unique(_numbers(clusters, len(differences))))
    if estimate.standard_error:
        p = _t_test(estimate.score / estimate.standard_error, groups - 1)
    else:
        p = 0.0 if estimate.score else 1.0
    return RunDifference(*estimate, p)


def paired_bootstrap(
    first: Statistic,
    second: Statistic,
    items: int,
    clusters: Sequence[object] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> RunDifference:
    """Compares two runs on the same items by a score that is no mean of items: both are scored
    on the same resamples (Koehn 2004).

    Args: as for `bootstrap_estimate`, with the statistic of each run.

    Returns: the comparison; p is twice the share of resamples, of the rarer sign, counting one
      more resample than there were, so that it is never 0.
    """
    drawn = np.array(
        [second(counts) - first(counts) for counts in _draws(items, clusters, resamples, seed)]
    )
    low, high = _percentiles(drawn, confidence)
    every = np.ones(items, np.int64)
    rarer = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    p = min(1.0, 2.0 * float(rarer + 1) / (len(drawn) + 1))
    return RunDifference(
        float(second(every) - first(every)), float(np.nanstd(drawn, ddof=1)), low, high, p
    )


def seed_spread(scores: Sequence[float], confidence: float = CONFIDENCE) -> Spread:
    """Summarises the scores of runs that differ by their seed."""
    values = np.asarray(scores, np.float64)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    estimate = mean_estimate(values, confidence=confidence)
    return Spread(estimate, deviation, float(np.min(values)), float(np.max(values)))


def _draws(
    items: int, clusters: Sequence[object] | None, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields how often each item is drawn, int [items], for each resample."""
    numbers = _numbers(clusters, items)
    groups = int(numbers.max()) + 1
    rng = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // groups)
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        for counts in rng.multinomial(groups, np.full(groups, 1.0 / groups), size):
            yield counts[numbers]


def _numbers(clusters: Sequence[object] | None, items: int) -> np.ndarray:
    """Numbers the clusters in the order of their first items; returns each item's number."""
    if clusters is None:
        return np.arange(items)
    if len(clusters) != items:
        raise ValueError(f"{items} items have {len(clusters)} clusters")
    known: dict[object, int] = {}
    return np.array([known.setdefault(cluster, len(known)) for cluster in clusters], np.int64)


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    outside = 50.0 * (1.0 - confidence)
    low, high = np.nanpercentile(drawn, [outside, 100.0 - outside])
    return float(low), float(high)


def _t_quantile(freedom: int, confidence: float) -> float:
    # Imported here: scipy takes long to import, and --help does not need it.
    from scipy import special

    return float(special.stdtrit(freedom, 0.5 + confidence / 2))


def _t_test(statistic: float, freedom: int) -> float:
    from scipy import special

    return float(2.0 * special.stdtr(freedom, -abs(statistic)))
