"""Hits at K of a ranking, in expectation over the order of ties."""

import numpy as np


def expected_hits_at_k(scores: np.ndarray, matches: np.ndarray, rank: int) -> np.ndarray:
    """Computes the probability that a match is among the `rank` highest scores of its row.

    Ties are broken uniformly at random, so a model that gives all candidates the same score
    gets chance level, not 0 or 1 by the order of the candidates.

    Args:
      scores: float [Q, C], of each query and candidate.
      matches: bool [Q, C], at least one True in each row.
      rank: K.

    Returns: float64 [Q], 0 or 1 unless the best match ties with other candidates.
    Raises: ValueError for a row without a match.
    """
    if not matches.any(1).all():
        raise ValueError("a query has no match among the candidates")
    best = np.where(matches, scores, -np.inf).max(1, keepdims=True)  # [Q, 1], the best match.
    before = (scores > best).sum(1)  # [Q], candidates ranked above it.
    own = (matches & (scores == best)).sum(1)  # [Q], matches in its tie.
    others = (~matches & (scores == best)).sum(1)  # [Q], others in its tie.
    # The first `rank - before` of the tie are drawn without replacement; multiply up the
    # probability that none of them is a match.
    missed = np.ones(len(scores))
    for drawn in range(rank):
        left = np.maximum(others - drawn, 0) / np.maximum(others + own - drawn, 1)
        missed = np.where(drawn < rank - before, missed * left, missed)
    return 1.0 - missed
