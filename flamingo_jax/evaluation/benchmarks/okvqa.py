"""OK-VQA (Marino et al. 2019): questions about COCO's images that need outside knowledge.

Three scores go by the name of its accuracy. Here, as in OpenFlamingo, predictions are reduced to
stems and compared with the stems of the annotations, by the rules of VQAv2. IDEFICS compares the
answers as they were given, and PaliGemma does without leaving annotators out.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.vqa_files import VqaFiles, read_vqa_files
from flamingo_jax.evaluation.prompts import QUESTION

_QUESTIONS, _ANSWERS = "OpenEnded_mscoco_{}_questions.json", "mscoco_{}_annotations.json"
SPLITS = {
    "val": VqaFiles(_QUESTIONS.format("val2014"), _ANSWERS.format("val2014"), "val2014"),
    "train": VqaFiles(_QUESTIONS.format("train2014"), _ANSWERS.format("train2014"), "train2014"),
}


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions and answers of a split."""
    return read_vqa_files(folder, SPLITS[split])


OKVQA = BenchmarkSet(
    name="okvqa",
    title="OK-VQA",
    layout={
        _QUESTIONS.format("{train2014,val2014}"): "questions",
        _ANSWERS.format("{train2014,val2014}"): "answers, each with its raw_answer",
        "train2014/": "images COCO_train2014_000000000009.jpg, ...",
        "val2014/": "images COCO_val2014_000000000042.jpg, ...",
    },
    kind="generate",
    template=QUESTION,
    scorer="okvqa",
    read=read,
    splits=tuple(SPLITS),
    support="train",
    submission="vqa",
)
