"""Exact match, and the type of a text metric."""

from collections.abc import Callable, Sequence

Metric = Callable[[str, Sequence[str]], float]
"""(prediction, ground truths) -> score from 0 to 1."""


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1.0 if the prediction equals one of the answers after `normalise`, else 0.0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def normalise(text: str) -> str:
    """Lower-cases a text, collapses its whitespace and removes a final full stop."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()
