"""Recall at K and top-K accuracy against every order of what is equal, query by query."""

import itertools

import numpy as np
import pytest

from flamingo_jax.evaluation.metrics.retrieval import recall_at_k
from flamingo_jax.evaluation.metrics.top_k import top_k_accuracy


def chance(scores: np.ndarray, mine: np.ndarray, rank: int) -> float:
    """The share of all orders by falling score that have one of mine among the first."""
    found = [
        any(mine[place] for place in order[:rank])
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return float(np.mean(found))


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_recall_is_that_of_all_orders(levels: int) -> None:
    """Few levels give many ties."""
    rng = np.random.default_rng(levels)
    similarities = rng.integers(0, levels, (12, 6)).astype(np.float32)
    matches = rng.random((12, 6)) < 0.2
    matches[np.arange(12), rng.integers(0, 6, 12)] = True
    for rank, share in recall_at_k(similarities, matches, (1, 2, 5, 10)).items():
        found = [chance(*pair, rank) for pair in zip(similarities, matches, strict=True)]
        assert share == pytest.approx(np.mean(found))


def test_what_tells_nothing_apart_recalls_what_guessing_does() -> None:
    found = recall_at_k(np.ones((20, 20)), np.eye(20, dtype=bool))
    assert found == pytest.approx({1: 0.05, 5: 0.25, 10: 0.5})
    with pytest.raises(ValueError, match="no match"):
        recall_at_k(np.ones((2, 2)), np.zeros((2, 2), bool))


@pytest.mark.parametrize("levels", [2, 1000])
def test_top_k_is_that_of_all_orders(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (15, 6)).astype(np.float32)
    targets = rng.integers(0, 6, 15)
    own = np.arange(6)[None] == targets[:, None]
    found = top_k_accuracy(scores, targets, (1, 5, 10))
    assert list(found) == [1, 5]
    for rank, share in found.items():
        assert share == pytest.approx(
            np.mean([chance(*pair, rank) for pair in zip(scores, own, strict=True)])
        )
