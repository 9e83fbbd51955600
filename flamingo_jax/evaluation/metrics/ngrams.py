"""Counts of n-grams, of which CIDEr and BLEU are made."""

from collections import Counter

ORDERS = 4
"""n-grams are counted for n from 1 to this."""


def ngram_counts(tokens: list[str]) -> list[Counter[tuple[str, ...]]]:
    """Counts the n-grams of a caption: [{n-gram: count} for n = 1, 2, 3, 4]."""
    return [
        Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
        for order in range(1, ORDERS + 1)
    ]
