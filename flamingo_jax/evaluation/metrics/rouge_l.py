"""ROUGE-L (Lin 2004) of captions, as pycocoevalcap computes it."""

from collections.abc import Sequence

BETA = 1.2
"""Weight of recall against precision."""


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Computes the F score of the longest common subsequence of a caption and its references:
    of the best precision and the best recall, which may be of different references.

    Args:
      prediction: tokens separated by single spaces.
      references: likewise, at least one.

    Returns: 0 to 1. The score of a set is the mean.
    """
    words = prediction.split(" ")
    common = [(common_length(words, tokens := text.split(" ")), len(tokens)) for text in references]
    precision = max(length for length, _ in common) / len(words)
    recall = max(length / size for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence (Hyyrö 2004: one word of bits a
    step).
    """
    places: dict[str, int] = {}
    for place, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << place
    every = (1 << len(first)) - 1
    rows = every
    for token in second:
        matched = rows & places.get(token, 0)
        rows = ((rows + matched) | (rows - matched)) & every
    return len(first) - rows.bit_count()
