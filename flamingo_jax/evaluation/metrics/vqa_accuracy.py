"""VQA accuracy as the official scorer has it (Antol et al. 2015)."""

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
"""An answer that so many others gave too scores 1."""


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Computes the official VQA accuracy (Antol et al. 2015): the mean, over leaving out one of the
    answers, of min(1, equal answers among the others / 3). With a single answer, exact match.

    As in the official scorer texts are normalised (`normalise_vqa`) only where the answers
    differ from each other, and answers are left out by their place, so that equal ones do not
    all drop out together.
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
    """Writes a text in the official scorer's form: punctuation, articles, number words and
    contractions made alike; lower case.
    """
    joins = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        # Punctuation beside a space goes; inside a word it parts two words.
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside or joins else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = (NUMBERS.get(word, word) for word in result.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
