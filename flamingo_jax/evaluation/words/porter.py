"""Porter's stemmer (1980) with nltk's extensions, which NExT-OE's lemmatiser falls back on."""

import re
from collections.abc import Callable

_IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie"} | {
    "innings": "inning",
    "outings": "outing",
    "cannings": "canning",
}
_KEPT = frozenset("sky news inning outing canning howe proceed exceed succeed".split())
_STEP_2 = """ational=ate tional=tion enci=ence anci=ance izer=ize bli=ble alli=al entli=ent eli=e
ousli=ous ization=ize ation=ate ator=ate alism=al iveness=ive fulness=ful ousness=ous aliti=al
iviti=ive biliti=ble fulli=ful""".split()
_STEP_3 = "icate=ic ative= alize=al iciti=ic ical=ic ful= ness=".split()
_STEP_4 = """al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive
ize""".split()


def stem(word: str) -> str:
    """Returns the stem of a word, in lower case."""
    word = word.lower()
    if word in _IRREGULAR or word in _KEPT:
        return _IRREGULAR.get(word, word)
    if len(word) <= 2:
        return word
    word = _participle(_plural(word))
    if word.endswith("y") and len(word) > 2 and _kinds(word)[-2] == "c":
        word = word[:-1] + "i"
    return _final_e(_step_4(_replace(_step_2(word), _STEP_3)))


def _kinds(word: str) -> str:
    """Marks each letter as a consonant (c) or a vowel (v); y is a vowel after a consonant."""
    kinds = ""
    for char in word:
        if char == "y":
            kinds += "c" if not kinds or kinds[-1] == "v" else "v"
        else:
            kinds += "v" if char in "aeiou" else "c"
    return kinds


def _measure(word: str) -> int:
    """Counts how often a vowel is followed by a consonant."""
    return _kinds(word).count("vc")


def _ends_short(word: str) -> bool:
    """Whether a word ends in consonant, vowel, consonant, the last not w, x or y; or is a vowel
    and a consonant.
    """
    kinds = _kinds(word)
    return (kinds.endswith("cvc") and word[-1] not in "wxy") or kinds == "vc"


def _replace(
    word: str, rules: list[str], fits: Callable[[str], bool] = lambda rest: _measure(rest) > 0
) -> str:
    """Replaces the first ending that is found, if what is left `fits`."""
    for rule in rules:
        old, _, new = rule.partition("=")
        if word.endswith(old):
            rest = word[: -len(old)]
            return rest + new if fits(rest) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]
    return _replace(word, ["sses=ss", "ies=i", "ss=ss", "s="], lambda rest: True)


def _participle(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    ending = next((end for end in ("ed", "ing") if word.endswith(end)), "")
    rest = word[: -len(ending)] if ending else ""
    if "v" not in _kinds(rest):
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) > 1 and rest[-1] == rest[-2] and _kinds(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if _measure(rest) == 1 and _ends_short(rest) else rest


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step_2(word[:-4] + "al")
    if word.endswith("logi") and not any(word.endswith(rule.partition("=")[0]) for rule in _STEP_2):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, _STEP_2)


def _step_4(word: str) -> str:
    ending = next((end for end in _STEP_4 if word.endswith(end)), "")
    rest = word[: -len(ending)] if ending else word
    if not ending or _measure(rest) <= 1 or (ending == "ion" and not re.search("[st]$", rest)):
        return word
    return rest


def _final_e(word: str) -> str:
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _ends_short(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
