"""VQA accuracy (Antol et al. 2015) by the official rules, and by those of others who publish
scores under the same name.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flamingo_jax.evaluation.metrics.exact_match import exact_match

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't should've shouldn't
shouldn't've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
she'd've somebody'd've we'd've
""".split()
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED
    for place, char in enumerate(word)
    if char == "'"
} | {"somebody'd": "somebodyd"}
"""{without one of its apostrophes: the contraction}. The last entry is the official scorer's."""
_COUNTED = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_COUNTED)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIODS = 32
"""Periods removed at most: the official scorer passes a flag where re.sub takes a count."""
AGREEMENT = 3
"""Annotators who must agree with a prediction for the full score of 1."""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Computes the official VQA accuracy: min(1, annotators who gave this answer / 3),
    averaged over leaving out each annotator in turn. With a single answer, exact match.

    Two details follow the official scorer: texts are normalised (`normalise_vqa`) only if the
    answers are not all equal, and one annotator is left out at a time, not all with the same
    answer.

    Args:
      prediction: the model's answer.
      answers: one per annotator (10 in VQAv2).
    Returns: a score from 0 to 1.
    """
    if len(answers) == 1:
        return exact_match(prediction, answers)
    return score_answers(prediction, answers, VARIANTS["official"])


class VqaVariant(NamedTuple):
    """Rules by which VQA accuracy is computed.

    about: whose they are.
    prediction, answer: normalise a prediction, and a ground truth.
    first: normalises a prediction before `prediction`, and in any case.
    unless_equal: whether texts are normalised only where the ground truths are not all equal.
    leaves_out: whether each annotator is left out in turn; otherwise min(1, n / 3) of all.
    strips: whether the outer white space of ground truths is removed.
    """

    about: str
    prediction: Callable[[str], str]
    answer: Callable[[str], str]
    unless_equal: bool = False
    leaves_out: bool = True
    first: Callable[[str], str] = str
    strips: bool = True


def score_answers(
    prediction: str,
    answers: Sequence[str],
    variant: VqaVariant,
    records: Sequence[object] | None = None,
) -> float:
    """Scores a prediction by the rules of a variant.

    Args:
      prediction: the model's answer.
      answers: one per annotator.
      variant: one of `VARIANTS`.
      records: what tells annotators apart, such as their answer_id. The official scorer leaves
        out all whose answer and record equal the one left out; by default none are.

    Returns: a score from 0 to 1.
    """
    found = variant.first(_one_line(prediction))
    truths = [_one_line(text) for text in answers] if variant.strips else list(answers)
    if not (variant.unless_equal and len(set(truths)) == 1):
        found, truths = variant.prediction(found), [variant.answer(text) for text in truths]
    equal = [truth == found for truth in truths]
    if not variant.leaves_out:
        return min(1.0, sum(equal) / AGREEMENT)
    left_out = []
    for place, is_equal in enumerate(equal):
        left = 1
        if records is not None:
            own = (truths[place], records[place])
            left = sum(own == twin for twin in zip(truths, records, strict=True))
        left_out.append(min(1.0, (sum(equal) - left * is_equal) / AGREEMENT))
    # An exact sum, so that the annotators' order says nothing.
    return math.fsum(left_out) / len(equal)


def normalise_vqa(text: str) -> str:
    """Normalises a text as the official scorer does: lower case, punctuation and articles
    removed, number words as digits, apostrophes restored in contractions.
    """
    return _plain_words(_without_punctuation(text))


def normalise_textvqa(text: str) -> str:
    """Normalises a text as TextVQA's evaluation does: also commas, question marks and the
    possessive 's are split off first.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_vqa(_one_line(text))


def _without_punctuation(text: str) -> str:
    joins = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        # A mark beside a space is removed, one inside a word becomes a space. A comma between
        # digits ("1,000") makes the official scorer remove all marks.
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside or joins else " ")
    return re.sub(r"\.(?!\d)", "", result, count=PERIODS)


def _plain_words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


VARIANTS = {
    "official": VqaVariant(
        "the evaluation code of VQAv2, also used by OpenFlamingo",
        normalise_vqa,
        normalise_vqa,
        unless_equal=True,
    ),
    "textvqa": VqaVariant(
        "the evaluation of TextVQA, and lmms-eval's of OK-VQA", normalise_textvqa, normalise_textvqa
    ),
    "lmms_eval": VqaVariant(
        "lmms-eval's evaluation of VQAv2: the prediction is also normalised as TextVQA's",
        normalise_vqa,
        normalise_vqa,
        unless_equal=True,
        first=normalise_textvqa,
    ),
    "vizwiz": VqaVariant(
        "the evaluation of VizWiz: only the prediction is normalised",
        normalise_vqa,
        str,
        strips=False,
    ),
    "plain": VqaVariant(
        "PaliGemma on OK-VQA: min(1, n / 3) of texts as they are", str, str, leaves_out=False
    ),
}
"""{name: rules}. Scores of different rules are not comparable."""


def ivqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Computes the accuracy of iVQA (Yang et al. 2021): 1 if at least two of the five annotators
    gave the answer, 0.5 if one did.

    The published models choose among the answers of the training set; a generated text is
    compared after lower-casing, with its outer white space removed.
    """
    own = prediction.strip().lower()
    return min(1.0, sum(answer.strip().lower() == own for answer in answers) / 2)
