"""Recall at K and top-K accuracy against sorting, query by query."""

import numpy as np
import pytest

from flamingo_jax.evaluation.metrics.retrieval import recall_at
from flamingo_jax.evaluation.metrics.top_k import top_k_accuracy


def first_place(scores: np.ndarray, mine: np.ndarray) -> int:
    """Where the first of mine stands, counted from 0, after what scores as high."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], mine[place]))
    return next(rank for rank, place in enumerate(order) if mine[place])


@pytest.mark.parametrize("levels", [3, 1000])
def test_recall_is_that_of_sorting(levels: int) -> None:
    """Few levels give many ties."""
    rng = np.random.default_rng(levels)
    similarities = rng.integers(0, levels, (40, 30)).astype(np.float32)
    matches = rng.random((40, 30)) < 0.1
    matches[np.arange(40), rng.integers(0, 30, 40)] = True
    places = np.array([first_place(*pair) for pair in zip(similarities, matches, strict=True)])
    for rank, share in recall_at(similarities, matches, (1, 2, 5, 10)).items():
        assert share == (places < rank).mean()


def test_what_tells_nothing_apart_recalls_nothing() -> None:
    assert recall_at(np.ones((20, 20)), np.eye(20, dtype=bool)) == {1: 0.0, 5: 0.0, 10: 0.0}
    with pytest.raises(ValueError, match="without a match|no match"):
        recall_at(np.ones((2, 2)), np.zeros((2, 2), bool))


@pytest.mark.parametrize("levels", [3, 1000])
def test_top_k_is_that_of_sorting(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (50, 7)).astype(np.float32)
    targets = rng.integers(0, 7, 50)
    own = np.arange(7)[None] == targets[:, None]
    places = np.array([first_place(*pair) for pair in zip(scores, own, strict=True)])
    found = top_k_accuracy(scores, targets, (1, 5, 10))
    assert found == {1: (places < 1).mean(), 5: (places < 5).mean()}
