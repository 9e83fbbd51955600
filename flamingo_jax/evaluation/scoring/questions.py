"""Scores answers to questions in the forms of VQAv2, OK-VQA, TextVQA and VizWiz."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.metrics.vqa_accuracy import VARIANTS, score_answers
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.report import ScoreReport, match
from flamingo_jax.evaluation.statistics import Estimate, mean_estimate
from flamingo_jax.evaluation.words import okvqa_stems
from flamingo_jax.evaluation.words.wordnet import WordNet, read_wordnet


class Annotated(NamedTuple):
    """The ground truths of a question.

    image: its image's id; several questions may have the same.
    answers: one per annotator.
    raw_answers: OK-VQA's answers before they were reduced to stems; none of other sets.
    records: what tells annotators apart where they have no distinct ids, else None.
    types: {"answer_type" or "question_type": the question's}.
    """

    image: Any
    answers: list[str]
    raw_answers: list[str]
    records: list[Any] | None
    types: dict[str, str]


def score_answer_files(
    annotations: str,
    predictions: str,
    questions: str = "",
    *,
    variant: str = "official",
    stems: bool = False,
    wordnet: str = "",
    skip_incomplete: bool = False,
) -> ScoreReport:
    """Scores a file of predicted answers by VQA accuracy.

    Args:
      annotations: VQAv2's form, {"annotations": [{"question_id", "image_id", "answers":
        [{"answer"}]}]}; TextVQA's, {"data": [{"question_id", "image_id", "answers": [text]}]};
        or VizWiz's, [{"image", "answers": [{"answer"}]}], whose questions have the image as id.
      predictions: [{"question_id", "answer"}]; for VizWiz, "image" in place of "question_id".
      questions: VQAv2's form, {"questions": [{"question_id", "image_id"}]}; if given, each
        question of the annotations must be in it.
      variant: one of `VARIANTS`.
      stems: whether to reduce each prediction to the stems that OK-VQA's answers are.
      wordnet: folder of WordNet 3.0's files, for stems; by default one that is found.
      skip_incomplete: whether to go on with the questions that have a prediction.

    Raises: UserError for a malformed file, and for missing or surplus predictions.
    """
    key, truths = read_annotations(annotations)
    if questions:
        _check_questions(questions, truths)
    found = _predictions(predictions, key)
    matched = match(truths, found, "question", skip_incomplete)
    asked = [truths[question] for question in matched.scored]
    texts = [found[question] for question in matched.scored]
    if stems:
        if not any(one.raw_answers for one in asked):
            raise UserError(f"{annotations} has no raw_answer, as OK-VQA's do: leave out --stems")
        texts = stem_predictions(texts, asked, read_wordnet(wordnet))
    metrics, items, about = score_questions(matched.scored, texts, asked, variant)
    about |= {
        **({"stems": okvqa_stems.ABOUT} if stems else {}),
        "annotations_sha256": files.digest(annotations),
    }
    return ScoreReport(metrics, items, about, matched.missing, matched.surplus)


def score_questions(
    ids: Sequence[Any], predictions: Sequence[str], truths: Sequence[Annotated], variant: str
) -> tuple[dict[str, Estimate], list[dict[str, Any]], dict[str, Any]]:
    """Scores answers by VQA accuracy, with errors over images.

    Args:
      ids: of the questions.
      predictions, truths: of each question.
      variant: one of `VARIANTS`.

    Returns: the metrics, items and rules of a `ScoreReport`, with the mean of each type.
    """
    rules = VARIANTS[variant]
    scores = [
        score_answers(text, truth.answers, rules, truth.records)
        for text, truth in zip(predictions, truths, strict=True)
    ]
    by_type: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for truth, score in zip(truths, scores, strict=True):
        for kind, name in truth.types.items():
            by_type[kind][name].append(score)
    about = {
        "variant": variant,
        "rules": rules.about,
        **{
            f"by_{kind}": {name: sum(some) / len(some) for name, some in sorted(types.items())}
            for kind, types in by_type.items()
        },
    }
    items = [{"id": one, "accuracy": score} for one, score in zip(ids, scores, strict=True)]
    return {"accuracy": mean_estimate(scores, [truth.image for truth in truths])}, items, about


def stem_predictions(
    predictions: Sequence[str], truths: Sequence[Annotated], wordnet: WordNet
) -> list[str]:
    """Reduces OK-VQA's predictions to stems, as the scored questions' own answers are."""
    stems = okvqa_stems.learn_stems(
        pair for truth in truths for pair in zip(truth.raw_answers, truth.answers)
    )
    return [okvqa_stems.stem_answer(text, stems, wordnet) for text in predictions]


def read_annotations(place: str) -> tuple[str, dict[Any, Annotated]]:
    """Reads the name of the field that identifies a question, and {its id: ground truths}, from
    a file in the form of `score_answer_files`.

    Raises: UserError for a malformed file, and for a question without answers.
    """
    content = files.read_json(place)
    if isinstance(content, dict):
        name = "data" if "data" in content else "annotations"
        entries = files.field(content, name, place, list)
    else:
        entries = files.as_list(content, place)
    key = "question_id" if isinstance(content, dict) else "image"

    def read() -> Iterator[tuple[Any, Annotated]]:
        for number, entry in enumerate(entries):
            where = f"{place}, entry {number},"
            question = files.field(entry, key, where, int, str)
            yield question, read_annotated(entry, question, where)

    return key, files.by_id(read(), place)


def read_annotated(entry: dict[str, Any], question: Any, where: str) -> Annotated:
    """Reads the ground truths of one entry of a file.

    Args:
      question: its id, which is also the image's where the entry has no image_id.
      where: how an error names the entry.

    Raises: UserError for a malformed entry.
    """
    answers = files.field(entry, "answers", where, list)
    if not answers:
        raise UserError(f"{where} has no answers: only annotated questions can be scored")
    types = {kind: str(entry[kind]) for kind in ("answer_type", "question_type") if entry.get(kind)}
    image = files.field(entry, "image_id", where, int, str) if "image_id" in entry else question
    if all(isinstance(answer, str) for answer in answers):
        return Annotated(image, answers, [], None, types)
    texts = [files.field(answer, "answer", where, str) for answer in answers]
    raw = []
    if all("raw_answer" in answer for answer in answers):
        raw = [files.field(answer, "raw_answer", where, str) for answer in answers]
    ids = {str(answer.get("answer_id", "")) for answer in answers}
    if len(ids) == len(answers) or "image" in entry:
        # VizWiz's own evaluation tells annotators apart by their place.
        return Annotated(image, texts, raw, None, types)
    records = [
        {name: value for name, value in answer.items() if name != "answer"} for answer in answers
    ]
    return Annotated(image, texts, raw, records, types)


def _check_questions(place: str, truths: dict[Any, Annotated]) -> None:
    """Raises UserError if a question of the annotations is not among the questions."""
    content = files.as_dict(files.read_json(place), place)
    known = {
        files.field(entry, "question_id", f"{place}, question {number},", int, str)
        for number, entry in enumerate(files.field(content, "questions", place, list))
    }
    unknown = [question for question in truths if question not in known]
    if unknown:
        raise UserError(
            f"{len(unknown):,} annotated questions are not in {place}, such as {unknown[0]}: give"
            " the questions and annotations of one split"
        )


def _predictions(place: str, key: str) -> dict[Any, str]:
    """Reads {question id: answer}."""
    entries = enumerate(files.as_list(files.read_json(place), place))
    return files.by_id(
        (
            (
                files.field(entry, key, f"{place}, entry {number},", int, str),
                files.field(entry, "answer", f"{place}, entry {number},", str),
            )
            for number, entry in entries
        ),
        place,
    )
