"""BLEU-1 to BLEU-4 (Papineni et al. 2002) with the closest reference's length, as pycocoevalcap
computes them.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from flamingo_jax.evaluation.metrics.ngrams import ORDERS, ngram_counts

_SMALL, _TINY = 1e-9, 1e-15
"""pycocoevalcap's guards against division by zero; they show in the tenth digit."""


def bleu_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Counts what BLEU is made of for each image.

    Args:
      predictions: a caption of each image, tokens separated by spaces.
      references: one or more captions of each image, likewise.

    Returns: int64 [images, 2 * 4 + 2]: n-grams of the prediction that a reference has, for n = 1
      to 4; n-grams of the prediction, likewise; its number of words; that of the reference
      closest in length.
    """
    rows = [_row(*pair) for pair in zip(predictions, references, strict=True)]
    return np.array(rows, np.int64).reshape(len(rows), 2 * ORDERS + 2)


def bleu(statistics: np.ndarray) -> np.ndarray:
    """Computes BLEU-1 to BLEU-4 of counts.

    Args:
      statistics: [..., 10] as of `bleu_statistics`: of one image, or summed over the images for
        BLEU of the corpus, which is no mean of the images' scores.

    Returns: float64 [..., 4], 0 to 1.
    """
    counts = np.asarray(statistics, np.float64)
    correct, guessed = counts[..., :ORDERS], counts[..., ORDERS : 2 * ORDERS]
    length, reference = counts[..., -2], counts[..., -1]
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), -1)
    scores = precision ** (1.0 / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (reference + _SMALL)
    penalty = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return scores * penalty[..., None]


def _row(prediction: str, references: Sequence[str]) -> list[int]:
    words = prediction.split()
    counts = ngram_counts(words)
    most: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(ORDERS)]
    lengths = []
    for reference in references:
        tokens = reference.split()
        lengths.append(len(tokens))
        for order, found in zip(most, ngram_counts(tokens), strict=True):
            order |= found
    correct = [sum((order & limit).values()) for order, limit in zip(counts, most, strict=True)]
    guessed = [max(0, len(words) - order) for order in range(ORDERS)]
    closest = min(lengths, key=lambda length: (abs(length - len(words)), length))
    return [*correct, *guessed, len(words), closest]
