"""Scores answers to questions in the forms of VQAv2, OK-VQA, TextVQA and VizWiz."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.metrics.vqa_accuracy import VARIANTS, score_answers
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.report import ScoreReport, match
from flamingo_jax.evaluation.statistics import mean_estimate
from flamingo_jax.evaluation.words import okvqa_stems
from flamingo_jax.evaluation.words.wordnet import WordNet, find_wordnet


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
    key, truths = _annotations(annotations)
    if questions:
        _check_questions(questions, truths)
    rules = VARIANTS[variant]
    found = _predictions(predictions, key)
    matched = match(truths, found, "question", skip_incomplete)
    if stems:
        found = _stemmed(found, truths, wordnet, annotations)
    scores = [
        score_answers(found[question], truths[question].answers, rules, truths[question].records)
        for question in matched.scored
    ]
    by_type: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question, score in zip(matched.scored, scores, strict=True):
        for kind, name in truths[question].types.items():
            by_type[kind][name].append(score)
    about = {
        "variant": variant,
        "rules": rules.about,
        **({"stems": okvqa_stems.ABOUT} if stems else {}),
        "annotations_sha256": files.digest(annotations),
        **{
            f"by_{kind}": {name: sum(some) / len(some) for name, some in sorted(types.items())}
            for kind, types in by_type.items()
        },
    }
    images = [truths[question].image for question in matched.scored]
    items = [
        {"id": question, "accuracy": score}
        for question, score in zip(matched.scored, scores, strict=True)
    ]
    metrics = {"accuracy": mean_estimate(scores, images)}
    return ScoreReport(metrics, items, about, matched.missing, matched.surplus)


def _annotations(place: str) -> tuple[str, dict[Any, Annotated]]:
    """Reads the name of the field that identifies a question, and {its id: ground truths}."""
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
            yield question, _annotated(entry, question, where)

    return key, files.by_id(read(), place)


def _annotated(entry: dict[str, Any], question: Any, where: str) -> Annotated:
    answers = files.field(entry, "answers", where, list)
    if not answers:
        raise UserError(f"{where} has no answers: only annotated questions can be scored")
    types = {kind: str(entry[kind]) for kind in ("answer_type", "question_type") if entry.get(kind)}
    image = files.field(entry, "image_id", where, int, str) if "image_id" in entry else question
    if all(isinstance(answer, str) for answer in answers):
        return Annotated(image, answers, [], None, types)
    texts = [files.field(answer, "answer", where, str) for answer in answers]
    raw = [files.field(a, "raw_answer", where, str) for a in answers if "raw_answer" in a]
    ids = {str(answer.get("answer_id", "")) for answer in answers}
    if len(ids) == len(answers) or "image" in entry:
        # VizWiz's own evaluation tells annotators apart by their place.
        return Annotated(image, texts, raw, None, types)
    records = [
        {name: value for name, value in answer.items() if name != "answer"} for answer in answers
    ]
    return Annotated(image, texts, raw, records, types)


def _stemmed(
    predictions: dict[Any, str], truths: dict[Any, Annotated], wordnet: str, place: str
) -> dict[Any, str]:
    """Reduces predictions to stems."""
    stems = okvqa_stems.learn_stems(
        pair for truth in truths.values() for pair in zip(truth.raw_answers, truth.answers)
    )
    if not stems:
        raise UserError(f"{place} has no raw_answer, as OK-VQA's do: leave out --stems")
    words = WordNet(find_wordnet(wordnet))
    return {
        question: okvqa_stems.stem_answer(answer, stems, words)
        for question, answer in predictions.items()
    }


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
