"""Examples of questions that several people answered: which answer a shot shows, and what VQA
accuracy needs of the others.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import MediaRef
from flamingo_jax.evaluation.scoring.questions import Annotated


def answered(id: str, media: MediaRef, question: str, truth: Annotated) -> BenchmarkExample:
    """Makes the example of a question in a form of VQA.

    Its first answer, which a shot shows, is the most frequent one, as VQAv2's own
    `multiple_choice_answer` and IDEFICS' evaluation have it; OpenFlamingo shows the first of the
    ten. The paper names neither. OK-VQA's are shown as they were given, not as stems, and their
    type is the question's: all their answers are of one type.
    """
    shown = truth.raw_answers or truth.answers
    first = most_frequent(shown)
    details: dict[str, Any] = {"types": truth.types}
    if truth.raw_answers:
        details["stems"] = _moved(truth.answers, first)
    if truth.records is not None:
        # Numbers of equal ones: all that a score needs.
        numbers = [truth.records.index(record) for record in truth.records]
        details["records"] = _moved(numbers, first)
    return BenchmarkExample(
        id,
        media,
        tuple(_moved(shown, first)),
        question,
        truth.types.get("question_type" if truth.raw_answers else "answer_type", ""),
        "" if str(truth.image) == id else str(truth.image),
        details=details,
    )


def most_frequent(answers: Sequence[str]) -> int:
    """Returns the place of the most frequent answer that is not empty, of equally frequent ones
    the first; 0 where all are empty.
    """
    counts = Counter(answer for answer in answers if answer.strip())
    return answers.index(max(counts, key=counts.__getitem__)) if counts else 0


def shown_first(answers: Sequence[str]) -> tuple[str, ...]:
    """Returns answers with the most frequent one first."""
    return tuple(_moved(answers, most_frequent(answers)))


def _moved(values: Sequence[Any], first: int) -> list[Any]:
    """Returns values with that of a place in front."""
    return [values[first], *values[:first], *values[first + 1 :]]
