"""Exact match, and what every metric of a text is."""

from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, ground truths) -> its score, 0 to 1."""


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Scores 1.0 where the prediction is one of the answers, both normalised."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def normalise(text: str) -> str:
    """Writes one space between words, lower case, and no full stop at the end."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
