"""VQA accuracy with the text normalisation of the official scorer (Antol et al. 2015)."""

import re
from collections.abc import Sequence

from flamingo_jax.evaluation.metrics.exact_match import exact_match

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll
ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd
there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
""".split()
_COUNTED = "zero one two three four five six seven eight nine ten".split()
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED}
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_COUNTED)}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
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
    prediction, *others = (
        " ".join(text.split()) if index == 0 else text.strip()
        for index, text in enumerate((prediction, *answers))
    )
    if len(set(others)) > 1:
        prediction, *others = (normalise_vqa(text) for text in (prediction, *others))
    equal = [answer == prediction for answer in others]
    return sum(min(1.0, (sum(equal) - left_out) / AGREEMENT) for left_out in equal) / len(equal)


def normalise_vqa(text: str) -> str:
    """Normalises a text as the official scorer does: lower case, punctuation and articles
    removed, number words as digits, apostrophes restored in contractions.
    """
    joins = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        # A mark beside a space is removed, one inside a word becomes a space. A comma between
        # digits ("1,000") makes the official scorer remove all marks.
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside or joins else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = (NUMBERS.get(word, word) for word in result.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
