"""Top-K accuracy, as classification is scored."""

from collections.abc import Sequence

import numpy as np

from flamingo_jax.evaluation.metrics.ranking import found_among_first


def top_k_accuracy(
    scores: np.ndarray, targets: np.ndarray, ranks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Computes which share of the queries has its class among its K highest scores.

    Args:
      scores: float [Q, C] of queries and classes.
      targets: int [Q], the place of each query's class.
      ranks: the K; those above C are left out.

    Returns: {K: share, 0 to 1}; of equal scores, by chance.
    """
    matches = np.arange(scores.shape[1]) == targets[:, None]
    return {
        rank: float(found_among_first(scores, matches, rank).mean())
        for rank in ranks
        if rank <= scores.shape[1]
    }
