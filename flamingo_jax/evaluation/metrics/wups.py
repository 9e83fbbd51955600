"""WUPS (Malinowski and Fritz 2014), the metric of open-ended NExT-QA, by the rules of NExT-OE."""

from collections.abc import Sequence

from flamingo_jax.evaluation.words.wordnet import WordNet

STOPWORDS = frozenset(
    """i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself
yourselves he him his himself she she's her hers herself it it's its itself they them their theirs
themselves what which who whom this that that'll these those am is are was were be been being have
has had having do does did doing a an the and but if or because as until while to from of at for
with about into through during again further then here there when where why how all any each most
other some such only own so than too very s t can will just don don't should should've now d ll m
o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven
haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't
wasn wasn't weren weren't won won't wouldn wouldn't""".split()
)
"""Words that are left out of answers; "no" and "not" are kept, as are prepositions of place."""
PENALTY = 0.1
"""Factor on a similarity below the threshold."""


def wups(
    prediction: Sequence[str], answer: Sequence[str], wordnet: WordNet, threshold: float = 0.0
) -> float:
    """Compares two answers word by word: the product of each word's similarity to the most
    similar one of the other answer, for the worse direction.

    Two rules are NExT-OE's own: only the first meaning of a word is compared, and words that are
    similar to none are skipped, not counted as 0.

    Args:
      prediction, answer: base forms without `STOPWORDS`.
      wordnet: where similarities are from.
      threshold: similarities below it are multiplied by 0.1; 0 for WUPS@0, 0.9 for WUPS@0.9.

    Returns: 0 to 1.
    """
    return min(
        _one_way(prediction, answer, wordnet, threshold),
        _one_way(answer, prediction, wordnet, threshold),
    )


def _one_way(
    words: Sequence[str], others: Sequence[str], wordnet: WordNet, threshold: float
) -> float:
    product, compared = 1.0, False
    for word in words:
        best = max((_similarity(word, other, wordnet, threshold) for other in others), default=0.0)
        if best:
            product, compared = product * best, True
    return product if compared else 0.0


def _similarity(word: str, other: str, wordnet: WordNet, threshold: float) -> float:
    if word == other:
        return 1.0
    first, second = wordnet.first_meaning(word), wordnet.first_meaning(other)
    if first is None or second is None:
        return 0.0
    similarity = wordnet.similarity(first, second)
    return similarity if similarity >= threshold else PENALTY * similarity
