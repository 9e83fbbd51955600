"""Reduces answers to the stems that OK-VQA's ground truths are.

Its annotations hold each answer as given and as a stem ("riding", "ride"), so that the stem of
most words can be read off them. OpenFlamingo has a table of such words in its code instead.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from flamingo_jax.evaluation.words.wordnet import WordNet

ABOUT = "the stems of the annotations' own raw answers; of other words, WordNet's base forms"
"""What a result says of the above."""


def learn_stems(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Finds the stem of each word in (raw answer, stemmed answer) pairs, in any order: the most
    frequent one, of equally frequent ones the shortest. Pairs with unequal numbers of words tell
    nothing.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for raw, stemmed in pairs:
        words, stems = raw.lower().split(), stemmed.lower().split()
        if len(words) == len(stems):
            for word, stem in zip(words, stems, strict=True):
                counts[word][stem] += 1
    return {
        word: min(found, key=lambda stem: (-found[stem], len(stem), stem))
        for word, found in counts.items()
    }


def stem_answer(text: str, stems: Mapping[str, str], wordnet: WordNet) -> str:
    """Replaces each word by its stem; of unknown words, those in -ing by the verb and plurals by
    the singular.
    """
    return " ".join(_stem(word, stems, wordnet) for word in text.lower().split())


def _stem(word: str, stems: Mapping[str, str], wordnet: WordNet) -> str:
    if word in stems:
        return stems[word]
    pos = "v" if word.endswith("ing") else "n" if word.endswith("s") else ""
    return min(wordnet.base_forms(word, pos), key=len, default=word) if pos else word
