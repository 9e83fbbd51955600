"""Whether a match is among the first K of a ranking, with ties as chance would order them."""

import numpy as np


def found_among_first(scores: np.ndarray, matches: np.ndarray, rank: int) -> np.ndarray:
    """Computes the chance that a match is among the `rank` highest scores of its row.

    Args:
      scores: float [Q, C]. matches: bool [Q, C], at least one in each row.

    Returns: float64 [Q]. 0 or 1, but where a match ties with others: there it is the expectation
      over all orders of what is equal, so that scores that tell nothing apart give what guessing
      does.
    Raises: ValueError for a row without a match.
    """
    if not matches.any(1).all():
        raise ValueError("a query has no match among the candidates")
    best = np.where(matches, scores, -np.inf).max(1, keepdims=True)
    before = (scores > best).sum(1)
    own = (matches & (scores == best)).sum(1)
    others = (~matches & (scores == best)).sum(1)
    # Places that are left for what is equal, drawn one by one: the chance that none is a match.
    missed = np.ones(len(scores))
    for drawn in range(rank):
        left = np.maximum(others - drawn, 0) / np.maximum(others + own - drawn, 1)
        missed = np.where(drawn < rank - before, missed * left, missed)
    return 1.0 - missed
