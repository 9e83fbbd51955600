"""Normalised discounted cumulative gain, the metric of VisDial (Das et al. 2017), as the
challenge's evaluation computes it.
"""

import numpy as np


def ndcg(scores: np.ndarray, relevance: np.ndarray) -> float:
    """Compares the best ranked options with the most relevant ones.

    Only the first K count, where K is the number of relevant options.

    Args:
      scores: float [options], higher for better answers; of equal ones the first counts as
        better.
      relevance: float [options], the share of annotators who found the option correct; at least
        one is not 0.

    Returns: 0 to 1.
    Raises: ValueError where no option is relevant.
    """
    relevant = int(np.count_nonzero(relevance))
    if not relevant:
        raise ValueError("no option is relevant")
    discounts = np.log2(np.arange(relevant) + 2.0)
    ranked = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:relevant]
    gain = np.sum(np.asarray(relevance, np.float64)[ranked] / discounts)
    return float(gain / np.sum(np.sort(relevance)[::-1][:relevant] / discounts))
