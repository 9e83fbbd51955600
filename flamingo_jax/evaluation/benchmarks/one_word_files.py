"""Reads the questions about videos that were made of captions (Xu et al. 2017), in the two sets'
common form: [{"id", "video_id", "question", "answer"}], one word for an answer.
"""

import pathlib
from collections.abc import Callable

from flamingo_jax.evaluation.benchmarks.benchmark_set import SplitContent
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import MediaRef
from flamingo_jax.evaluation.scoring import files

SPLITS = ("test", "val", "train")
FILE = "{}_qa.json"
TYPES = ("what", "who", "how", "when", "where")
"""Types of question, by which the sets' owners report: the first word."""


def read_one_word_files(
    folder: pathlib.Path, split: str, clip: Callable[[int], MediaRef]
) -> SplitContent:
    """Reads a split.

    clip: the video of a video_id.
    """
    place = folder / FILE.format(split)
    examples = []
    for number, entry in enumerate(files.as_list(files.read_json(str(place)), str(place))):
        where = f"{place}, entry {number},"
        video = files.field(entry, "video_id", where, int)
        question = files.field(entry, "question", where, str)
        first = question.lower().partition(" ")[0]
        examples.append(
            BenchmarkExample(
                str(files.field(entry, "id", where, int)),
                clip(video),
                (files.field(entry, "answer", where, str),),
                question,
                first if first in TYPES else "",
                str(video),
            )
        )
    return SplitContent(examples, [place])
