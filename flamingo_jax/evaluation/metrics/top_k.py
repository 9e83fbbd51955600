"""Top-K accuracy, as classification is scored."""

from collections.abc import Sequence

import numpy as np


def top_k_accuracy(
    scores: np.ndarray, targets: np.ndarray, ranks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Computes which share of the queries has its class among its K highest scores.

    Args:
      scores: float [Q, C] of queries and classes.
      targets: int [Q], the place of each query's class.
      ranks: the K; those above C are left out.

    Returns: {K: share, 0 to 1}. What scores as high as the target stands before it.
    """
    own = np.take_along_axis(scores, targets[:, None], 1)
    before = (scores >= own).sum(1) - 1
    return {rank: float((before < rank).mean()) for rank in ranks if rank <= scores.shape[1]}
