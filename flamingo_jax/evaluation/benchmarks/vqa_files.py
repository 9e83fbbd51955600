"""Reads questions and answers about COCO's images in VQA's two files: one has the questions,
one the answers, by question_id.
"""

import pathlib
from typing import NamedTuple

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.annotators import answered
from flamingo_jax.evaluation.benchmarks.benchmark_set import SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.questions import read_annotations


class VqaFiles(NamedTuple):
    """Where a split lies.

    questions: file of {"questions": [{"question_id", "image_id", "question"}]}.
    annotations: file of {"annotations": [{"question_id", "answers", ...}]}; "" where the owners
      keep the answers.
    images: folder of COCO's images, in whose names it is.
    """

    questions: str
    annotations: str
    images: str


def read_vqa_files(folder: pathlib.Path, split: VqaFiles) -> SplitContent:
    """Reads a split in the order of its questions; without annotations there are no answers.

    Raises: UserError for a malformed file, and for a question without an annotation.
    """
    place = str(folder / split.questions)
    content = files.as_dict(files.read_json(place), place)
    read = [folder / split.questions]
    truths = None
    if split.annotations:
        read.append(folder / split.annotations)
        _, truths = read_annotations(str(read[-1]))
    images = MediaFolder(folder / split.images)
    examples = []
    for number, entry in enumerate(files.field(content, "questions", place, list)):
        where = f"{place}, question {number},"
        key = files.field(entry, "question_id", where, int)
        image = files.field(entry, "image_id", where, int)
        media = images.image(f"COCO_{split.images}_{image:012}.jpg")
        question = files.field(entry, "question", where, str)
        if truths is None:
            examples.append(BenchmarkExample(str(key), media, (), question, cluster=str(image)))
        elif key in truths:
            examples.append(answered(str(key), media, question, truths[key]))
        else:
            raise UserError(
                f"{where} has the id {key}, of which {read[-1]} has no annotation: give both files"
                " of one split"
            )
    return SplitContent(examples, read)
