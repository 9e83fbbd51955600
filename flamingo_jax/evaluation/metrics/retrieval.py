"""Recall at K, as image-text retrieval is scored (CLIP, ALIGN: R@1, R@5, R@10)."""

from collections.abc import Sequence

import numpy as np

RANKS = (1, 5, 10)


def recall_at(
    similarities: np.ndarray, matches: np.ndarray, ranks: Sequence[int] = RANKS
) -> dict[int, float]:
    """Computes which share of the queries has a match among its K most similar candidates.

    Args:
      similarities: float [Q, C] of queries and candidates.
      matches: bool [Q, C], True where the candidate is one of the query's own; several may be.
      ranks: the K.

    Returns: {K: share, 0 to 1}. What is as similar as a match stands before it: an encoder that
      tells nothing apart recalls nothing.
    Raises: ValueError for a query without a match.
    """
    if not matches.any(1).all():
        raise ValueError("a query has no match among the candidates")
    best = np.where(matches, similarities, -np.inf).max(1, keepdims=True)
    before = (~matches & (similarities >= best)).sum(1)
    return {rank: float((before < rank).mean()) for rank in ranks}
