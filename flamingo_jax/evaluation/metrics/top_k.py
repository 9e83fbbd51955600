"""Top-K accuracy, the metric of classification."""

from collections.abc import Sequence

import numpy as np

from flamingo_jax.evaluation.metrics.ranking import expected_hits_at_k


def top_k_accuracy(
    scores: np.ndarray, targets: np.ndarray, ranks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Computes the fraction of queries whose class is among their K highest scores.

    Args:
      scores: float [Q, C] of queries and classes.
      targets: int [Q], the index of each query's class.
      ranks: the values of K; those above C are left out.

    Returns: {K: fraction from 0 to 1}, ties in expectation (`expected_hits_at_k`).
    """
    matches = np.arange(scores.shape[1]) == targets[:, None]  # [Q, C]
    return {
        rank: float(expected_hits_at_k(scores, matches, rank).mean())
        for rank in ranks
        if rank <= scores.shape[1]
    }
