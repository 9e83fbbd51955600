"""mWAP, NDCG and the area under the ROC curve against slow forms of their definitions."""

import itertools
from collections import Counter

import numpy as np
import pytest

from flamingo_jax.evaluation.metrics.average_precision import average_precision, roc_auc
from flamingo_jax.evaluation.metrics.mwap import RareActSegment, weighted_average_precisions
from flamingo_jax.evaluation.metrics.ndcg import ndcg

RNG = np.random.default_rng(3)


def slow_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    """The sum over thresholds of the rise of recall times precision."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        shown = scores >= threshold
        positive = weights[shown & labels].sum()
        recall = positive / weights[labels].sum()
        total += (recall - before) * positive / weights[shown].sum()
        before = recall
    return total


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_is_that_of_all_thresholds(levels: int) -> None:
    for _ in range(20):
        labels = RNG.random(30) < 0.3
        labels[0] = True
        scores = RNG.integers(0, levels, 30).astype(np.float32)
        weights = RNG.random(30) + 0.1
        found = average_precision(labels, scores, weights)
        assert found == pytest.approx(slow_precision(labels, scores, weights))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_the_area_is_the_share_of_ordered_pairs(levels: int) -> None:
    labels = np.arange(40) % 3 == 0
    scores = RNG.integers(0, levels, 40).astype(float)
    counts = RNG.integers(0, 3, 40)
    pairs = [
        (counts[i] * counts[j], (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
        for i, j in itertools.product(np.flatnonzero(labels), np.flatnonzero(~labels))
    ]
    weights, ordered = np.array(pairs, float).T
    assert roc_auc(labels, scores) == pytest.approx(ordered.mean())
    assert roc_auc(labels, scores, counts) == pytest.approx(np.average(ordered, weights=weights))


def test_an_area_without_negatives_is_unknown() -> None:
    assert np.isnan(roc_auc(np.array([True, False]), np.array([1.0, 0.0]), np.array([1, 0])))


def test_mwap_groups_segments_as_rareact_does() -> None:
    """Row by row, as the paper's appendix describes it."""
    verbs, nouns = ["cut", "hammer", "blend"], ["phone", "egg"]
    actions = list(itertools.product(verbs, nouns))
    rows = [
        RareActSegment(f"v{RNG.integers(12)}", actions.index(action), *action, int(RNG.integers(5)))
        for action in actions
        for _ in range(12)
    ]
    scores = RNG.integers(0, 6, (len(rows), len(actions))).astype(np.float32)
    found = weighted_average_precisions(rows, scores)
    for number, (verb, noun) in enumerate(actions):
        groups: dict[str, list[int]] = {"positive": [], "negative": [], "hard": []}
        for place, row in enumerate(rows):
            shared = (row.verb == verb) + (row.noun == noun)
            if shared == 2:
                kind = {1: "positive", 0: "negative"}.get(row.annotation, "hard")
            elif row.annotation == 1:
                kind = "hard" if shared else "negative"
            else:
                continue
            groups[kind].append(place)
        weights = np.zeros(len(rows))
        for places in groups.values():
            videos = Counter(rows[place].video for place in places)
            for place in places:
                weights[place] = 1 / videos[rows[place].video]
        labels = np.isin(np.arange(len(rows)), groups["positive"])
        used = weights > 0
        expected = slow_precision(labels[used], scores[used, number], weights[used])
        assert found[verb, noun] == pytest.approx(expected)


def test_an_action_without_a_positive_is_left_out() -> None:
    rows = [RareActSegment("a", 0, "cut", "egg", 1), RareActSegment("b", 1, "blend", "phone", 0)]
    found = weighted_average_precisions(rows, np.array([[0.9, 0.1], [0.2, 0.3]]))
    assert found == {("cut", "egg"): 1.0}


def test_ndcg_is_its_formula() -> None:
    relevance = np.array([0.0, 0.5, 1.0, 0.0, 0.2])
    scores = np.array([5.0, 1.0, 4.0, 3.0, 2.0])
    discount = [1.0, 1 / np.log2(3), 0.5]
    best = np.dot([1.0, 0.5, 0.2], discount)
    assert ndcg(scores, relevance) == pytest.approx(np.dot([0.0, 1.0, 0.0], discount) / best)
    assert ndcg(relevance, relevance) == 1.0
    with pytest.raises(ValueError, match="no option"):
        ndcg(scores, np.zeros(5))
