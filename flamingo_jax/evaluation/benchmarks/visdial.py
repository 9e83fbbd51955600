"""VisDial 1.0 (Das et al. 2017): dialogues about an image, with 100 candidate answers."""

import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ImageFile
from flamingo_jax.evaluation.prompts import PromptTemplate
from flamingo_jax.evaluation.scoring import files

DENSE = "visdial_1.0_val_dense_annotations.json"
VAL_IMAGES = "VisualDialog_val2018"
DIALOGUE = PromptTemplate("{question} Answer:")


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads a split: of `val` the rounds that have dense annotations, one of each dialogue, and
    of `train`, which gives shots, the last rounds.

    A dialogue is its caption and its turns `Question: ... Answer: ...` up to the answer, the
    texts as in the files; the paper says that the caption comes first, without a prompt (B.1.5).
    """
    place = folder / f"visdial_1.0_{split}.json"
    text = files.read_text(str(place))
    if split == "train":
        # 123 million numbers of candidates, which shots do without.
        text = re.sub(r'"answer_options":\s*\[[^\]]*\]', '"answer_options":[]', text)
    data = files.as_dict(files.parse_json(text, str(place)), str(place)).get("data")
    where = f"{place}, data,"
    texts = _Texts(
        files.field(data, "questions", where, list),
        files.field(data, "answers", where, list),
    )
    dialogues = files.field(data, "dialogs", where, list)
    if split == "train":
        image = _train_images(folder)
        examples = [
            _example(one, f"{place}, dialogue {number},", texts, image, None)
            for number, one in enumerate(dialogues)
        ]
        return SplitContent(examples, [place])
    dense = _dense(folder / DENSE)
    image = _val_images(folder)
    examples = []
    for number, one in enumerate(dialogues):
        at = f"{place}, dialogue {number},"
        key = files.field(one, "image_id", at, int)
        if key in dense:
            examples.append(_example(one, at, texts, image, dense.pop(key)))
    if dense:
        raise UserError(
            f"{DENSE} has {len(dense):,} images that are not in {place}, such as"
            f" {next(iter(dense))}: name the files of one version"
        )
    return SplitContent(examples, [place, folder / DENSE])


class _Texts:
    """The questions and answers that dialogues name by their numbers."""

    def __init__(self, questions: list[Any], answers: list[Any]):
        self._all = {"question": questions, "answer": answers}

    def of(self, kind: str, number: Any, where: str) -> str:
        """Returns a question or an answer. Raises UserError where there is none."""
        known = self._all[kind]
        there = type(number) is int and 0 <= number < len(known)
        if not there or not isinstance(known[number], str):
            raise UserError(f"{where} has the {kind} {number!r}, which is no text of the file")
        return known[number]


def _example(
    entry: Any,
    where: str,
    texts: _Texts,
    image: Callable[[int], ImageFile],
    dense: tuple[int, list[float]] | None,
) -> BenchmarkExample:
    """Makes the example of a dialogue's round: the one with dense annotations, or the last."""
    number = files.field(entry, "image_id", where, int)
    turns = files.field(entry, "dialog", where, list)
    last = dense[0] if dense else len(turns)
    if not 1 <= last <= len(turns):
        raise UserError(f"{where} has {len(turns)} rounds, but annotations are of round {last}")
    written = [files.field(entry, "caption", where, str)]
    answer = ""
    for place, turn in enumerate(turns[:last]):
        fields = files.as_dict(turn, where)
        if place:
            written.append(f"Answer: {answer}")
        question = texts.of("question", fields.get("question"), where)
        written.append(f"Question: {question}")
        answer = texts.of("answer", fields.get("answer"), where)
    candidates: Sequence[str] = ()
    details: dict[str, Any] = {}
    if dense:
        options = files.field(turns[last - 1], "answer_options", where, list)
        candidates = [texts.of("answer", option, where) for option in options]
        if len(options) != len(dense[1]):
            raise UserError(
                f"{where} has {len(options)} candidates, but {DENSE} the relevance of"
                f" {len(dense[1])}"
            )
        details = {"image_id": number, "round_id": last, "relevance": dense[1]}
    return BenchmarkExample(
        str(number),
        image(number),
        (answer,),
        " ".join(written),
        cluster=str(number),
        candidates=tuple(candidates),
        details=details,
    )


def _dense(place: pathlib.Path) -> dict[int, tuple[int, list[float]]]:
    """Reads {image id: (number of the round from 1, relevance of each candidate)}."""

    def entry(number: int, fields: Any) -> tuple[int, tuple[int, list[float]]]:
        where = f"{place}, entry {number},"
        relevance = files.field(fields, "gt_relevance", where, list)
        if not all(type(value) in (int, float) for value in relevance) or not any(relevance):
            raise UserError(f"{where} has a gt_relevance of no numbers, or of zeros alone")
        return files.field(fields, "image_id", where, int), (
            files.field(fields, "round_id", where, int),
            [float(value) for value in relevance],
        )

    entries = files.as_list(files.read_json(str(place)), str(place))
    return files.by_id((entry(*pair) for pair in enumerate(entries)), str(place))


def _val_images(folder: pathlib.Path) -> Callable[[int], ImageFile]:
    images = MediaFolder(folder / VAL_IMAGES)
    return lambda number: images.image(f"VisualDialog_val2018_{number:012d}.jpg")


def _train_images(folder: pathlib.Path) -> Callable[[int], ImageFile]:
    """Returns a function to an image of COCO's train2014 or val2014."""
    train, val = MediaFolder(folder / "train2014"), MediaFolder(folder / "val2014")

    def image(number: int) -> ImageFile:
        found = val.image(f"COCO_val2014_{number:012d}.jpg")
        return found if found.there else train.image(f"COCO_train2014_{number:012d}.jpg")

    return image


VISDIAL = BenchmarkSet(
    name="visdial",
    title="VisDial",
    layout={
        "visdial_1.0_{val,train}.json": "dialogues",
        DENSE: "how relevant each candidate is, for one round of each dialogue",
        f"{VAL_IMAGES}/": "images VisualDialog_val2018_000000000001.jpg, ...",
        "train2014/, val2014/": "COCO's images, for shots",
    },
    kind="rank",
    template=DIALOGUE,
    scorer="ndcg",
    read=read,
    splits=("val", "train"),
    support="train",
    # 32 dialogues are longer than the 2,048 tokens that the paper's models were trained on.
    shots=(0, 4, 8, 16),
)
