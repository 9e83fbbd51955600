"""VQAv2 (Goyal et al. 2017): questions about COCO's images, ten answers each.

The paper asks test-dev, whose answers the owners keep: ask split `test-dev`, or `test`, of which
it is a part, and submit the predictions (`scoring.submission`). OpenFlamingo and IDEFICS ask
`val`, as here by default.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.vqa_files import VqaFiles, read_vqa_files
from flamingo_jax.evaluation.prompts import QUESTION

_QUESTIONS, _ANSWERS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"
SPLITS = {
    "val": VqaFiles(_QUESTIONS.format("val2014"), _ANSWERS.format("val2014"), "val2014"),
    "test-dev": VqaFiles(_QUESTIONS.format("test-dev2015"), "", "test2015"),
    "test": VqaFiles(_QUESTIONS.format("test2015"), "", "test2015"),
    "train": VqaFiles(_QUESTIONS.format("train2014"), _ANSWERS.format("train2014"), "train2014"),
}


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions of a split, and the answers where there are any."""
    return read_vqa_files(folder, SPLITS[split])


VQAV2 = BenchmarkSet(
    name="vqav2",
    title="VQAv2",
    layout={
        _QUESTIONS.format("{train2014,val2014,test-dev2015,test2015}"): "questions",
        _ANSWERS.format("{train2014,val2014}"): "answers",
        "train2014/": "images COCO_train2014_000000000009.jpg, ...",
        "val2014/": "images COCO_val2014_000000000042.jpg, ...",
        "test2015/": "images COCO_test2015_000000000001.jpg, ...",
    },
    kind="generate",
    template=QUESTION,
    scorer="vqa",
    read=read,
    splits=tuple(SPLITS),
    support="train",
    submission="vqa",
)
