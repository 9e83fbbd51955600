"""CIDEr and CIDEr-D, the metrics of captioning (Vedantam et al. 2015).

A caption is the vector of its n-grams, weighted by how rare each is among the images' references
(tf-idf); the score is 10 times the cosine with each reference, averaged over references and n = 1
to 4. CIDEr-D, which pycocoevalcap calls CIDEr and papers report, counts an n-gram no more often
than the reference has it and lowers the score of other lengths.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flamingo_jax.evaluation.metrics.ngrams import ORDERS, ngram_counts

SIGMA = 6.0
"""Standard deviation of the penalty on the difference of lengths, in bigrams."""

Counts = list[Counter[tuple[str, ...]]]
Weights = dict[tuple[str, ...], float]


class _Vector(NamedTuple):
    """A caption's weights of n-grams, the norms for each n, and its number of bigrams."""

    weights: list[Weights]
    norms: list[float]
    bigrams: int


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Computes CIDEr-D of each image, as pycocoevalcap does.

    Rarity is counted among the given references: scores of a subset are not comparable with
    those of the whole set, and those of one image are 0.

    Args:
      predictions: a caption of each image, tokens separated by spaces (`ptb.tokenizer`).
      references: one or more captions of each image, likewise.

    Returns: float64 [images], 0 to 10. The score of the set is the mean.
    """
    return _scores(predictions, references, _clipped_similarity)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Computes plain CIDEr of each image, without CIDEr-D's clipping and penalty on length. See
    `cider_d`.
    """
    return _scores(predictions, references, _similarity)


def _scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    similarity: Callable[[_Vector, _Vector], float],
) -> np.ndarray:
    """Averages `similarity` over n and the references of each image."""
    counted = [[ngram_counts(caption.split()) for caption in captions] for captions in references]
    in_images: Counter[tuple[str, ...]] = Counter()
    for captions in counted:
        in_images.update({ngram for counts in captions for order in counts for ngram in order})
    images = math.log(len(counted)) if counted else 0.0
    rarity = {ngram: images - math.log(number) for ngram, number in in_images.items()}
    scores = []
    for caption, captions in zip(predictions, counted, strict=True):
        predicted = _vector(ngram_counts(caption.split()), rarity, images)
        total = sum(similarity(predicted, _vector(c, rarity, images)) for c in captions)
        scores.append(10.0 * total / ORDERS / len(captions))
    return np.array(scores)


def _vector(counts: Counts, rarity: Weights, unseen: float) -> _Vector:
    """Weights the counts of a caption; an n-gram of no reference is as rare as one of one image,
    which is `unseen`.
    """
    weights = [
        {ngram: number * rarity.get(ngram, unseen) for ngram, number in order.items()}
        for order in counts
    ]
    norms = [math.sqrt(sum(weight * weight for weight in order.values())) for order in weights]
    return _Vector(weights, norms, sum(counts[1].values()))


def _similarity(predicted: _Vector, reference: _Vector) -> float:
    """Returns the sum of the cosines for all n."""
    total = 0.0
    for order, other, norm, other_norm in zip(
        predicted.weights, reference.weights, predicted.norms, reference.norms
    ):
        if norm and other_norm:
            products = (weight * other[ngram] for ngram, weight in order.items() if ngram in other)
            total += sum(products) / (norm * other_norm)
    return total


def _clipped_similarity(predicted: _Vector, reference: _Vector) -> float:
    """Returns the sum of CIDEr-D's similarities for all n."""
    total = 0.0
    for order, other, norm, other_norm in zip(
        predicted.weights, reference.weights, predicted.norms, reference.norms
    ):
        if norm and other_norm:
            products = (
                min(weight, other[ngram]) * other[ngram]
                for ngram, weight in order.items()
                if ngram in other
            )
            total += sum(products) / (norm * other_norm)
    difference = predicted.bigrams - reference.bigrams
    return total * math.exp(-(difference**2) / (2 * SIGMA**2))
