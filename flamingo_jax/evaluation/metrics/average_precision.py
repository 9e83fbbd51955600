"""Average precision and the area under the ROC curve of scores with weights."""

import numpy as np


def average_precision(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    """Computes the mean precision over the steps of recall (scikit-learn's
    `average_precision_score`).

    Args:
      labels: bool [N], at least one True.
      scores: float [N]; equal ones are one step.
      weights: float [N], how much each example counts; positive.

    Returns: 0 to 1.
    """
    positive, every = _cumulated(labels, scores, weights)
    recall = positive / positive[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * positive / every))


def roc_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Computes the area under the ROC curve: the probability that a positive example has the
    higher score, with ties counted half (scikit-learn's `roc_auc_score`).

    Args:
      labels: bool [N], with both values.
      scores: float [N].
      weights: float [N], how much each example counts; 1 by default.

    Returns: 0 to 1; NaN where the weights leave no example of one label.
    """
    weights = np.ones(len(labels)) if weights is None else weights
    positive, every = _cumulated(labels, scores, weights)
    negative = every - positive
    if not positive[-1] or not negative[-1]:
        return float("nan")
    below = (np.diff(negative, prepend=0.0)) * (positive + np.append(0.0, positive[:-1])) / 2
    return float(below.sum() / (positive[-1] * negative[-1]))


def _cumulated(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weight of positive examples, and of all, down to each distinct score."""
    order = np.argsort(-scores, kind="stable")
    falls = np.append(np.diff(scores[order]) != 0, True)
    weights = np.asarray(weights, np.float64)[order]
    return np.cumsum(weights * labels[order])[falls], np.cumsum(weights)[falls]
