"""Recall at K (R@1, R@5, R@10), the metric of image-text retrieval in CLIP, ALIGN and
Flamingo.
"""

from collections.abc import Sequence

import numpy as np

from flamingo_jax.evaluation.metrics.ranking import expected_hits_at_k

RANKS = (1, 5, 10)


def recall_at_k(
    similarities: np.ndarray, matches: np.ndarray, ranks: Sequence[int] = RANKS
) -> dict[int, float]:
    """Computes the fraction of queries with a match among their K most similar candidates.

    Args:
      similarities: float [Q, C] of queries and candidates.
      matches: bool [Q, C], True where the candidate is correct for the query; a query may have
        several.
      ranks: the values of K.

    Returns: {K: fraction from 0 to 1}, ties in expectation (`expected_hits_at_k`).
    Raises: ValueError for a query without a match.
    """
    return {rank: float(expected_hits_at_k(similarities, matches, rank).mean()) for rank in ranks}
