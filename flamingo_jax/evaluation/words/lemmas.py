"""Lemmatises short answers as NExT-OE's evaluation does, with WordNet.

Its lemmatiser (pywsd's) asks nltk's perceptron tagger for the part of speech of each word, whose
weights cannot be had as a package. In its place, the part of speech is the one in which the word
is most frequent in the texts that WordNet's makers tagged.
"""

import functools
import re

from flamingo_jax.evaluation.words import porter
from flamingo_jax.evaluation.words.wordnet import POS, WordNet

TAGGER = "the most frequent part of speech in WordNet 3.0's counts, in place of nltk's tagger"
"""What a result says of the above."""

_SPLITS = (
    (re.compile("([«“‘„]|[`]+)"), r" \1 "),
    (re.compile('^"'), "``"),
    (re.compile("(``)"), r" \1 "),
    (re.compile("([ (\\[{<])(\"|'{2})"), r"\1 `` "),
    (re.compile(r"([^.])(\.)([\])}>\"'»”’ ]*)\s*$"), r"\1 \2 \3 "),
    (re.compile(r"([:,])([^\d])"), r" \1 \2"),
    (re.compile("([:,])$"), r" \1 "),
    (re.compile(r"\.\.\."), " ... "),
    (re.compile("[;@#$%&]"), r" \g<0> "),
    (re.compile("[?!]"), r" \g<0> "),
    (re.compile("([^'])' "), r"\1 ' "),
    (re.compile(r"[\]\[(){}<>]"), r" \g<0> "),
    (re.compile("--"), " -- "),
)
_CLITICS = (
    (re.compile("([»”’]+)"), r" \1 "),
    (re.compile("''"), " '' "),
    (re.compile('"'), " '' "),
    (re.compile("([^' ])('[sS]|'[mM]|'[dD]|') "), r"\1 \2 "),
    (re.compile("([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) "), r"\1 \2 "),
    (re.compile(r"(?i)\b(can)(not)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(d)('ye)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(gim|lem)(me)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(gon|wan)(na)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(got)(ta)\b"), r" \1 \2 "),
    (re.compile(r"(?i)\b(more)('n)\b"), r" \1 \2 "),
    (re.compile(r"(?i) ('t)(is|was)\b"), r" \1 \2 "),
)


def split_words(text: str) -> list[str]:
    """Splits a sentence into words, punctuation and clitics, as nltk's Treebank tokenizer
    does.
    """
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    text = f" {text} "
    for pattern, replacement in _CLITICS:
        text = pattern.sub(replacement, text)
    return text.split()


class Lemmatiser:
    """Replaces words by their base forms."""

    def __init__(self, wordnet: WordNet):
        self._wordnet = wordnet

    def sentence(self, text: str) -> list[str]:
        """Returns the base forms of the words of a sentence."""
        return [self.word(word.lower()) for word in split_words(text)]

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - one lemmatiser for a run
    def word(self, word: str) -> str:
        """Returns the shortest base form of a word that WordNet has; if it has none, the word's
        stem if WordNet has that; else the word.
        """
        forms = self._wordnet.base_forms(word, self.part_of_speech(word))
        lemma = min(forms, key=len, default=word)
        if self._wordnet.first_meaning(lemma):
            return lemma
        stem = porter.stem(word)
        return stem if self._wordnet.first_meaning(stem) else word

    def part_of_speech(self, word: str) -> str:
        """Returns the part of speech in which a word is most frequent, noun if it is unknown."""

        def uses(pos: str) -> int:
            forms = self._wordnet.base_forms(word, pos)
            return max((self._wordnet.uses.get((form, pos), 0) for form in forms), default=-1)

        return max(POS, key=uses)
