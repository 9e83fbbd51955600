"""Recall at K, as image-text retrieval is scored (CLIP, ALIGN: R@1, R@5, R@10)."""

from collections.abc import Sequence

import numpy as np

from flamingo_jax.evaluation.metrics.ranking import found_among_first

RANKS = (1, 5, 10)


def recall_at(
    similarities: np.ndarray, matches: np.ndarray, ranks: Sequence[int] = RANKS
) -> dict[int, float]:
    """Computes which share of the queries has a match among its K most similar candidates.

    Args:
      similarities: float [Q, C] of queries and candidates.
      matches: bool [Q, C], True where the candidate is one of the query's own; several may be.
      ranks: the K.

    Returns: {K: share, 0 to 1}; of what is equally similar, by chance.
    Raises: ValueError for a query without a match.
    """
    return {rank: float(found_among_first(similarities, matches, rank).mean()) for rank in ranks}
