"""MSRVTT-QA (Xu et al. 2017): questions about videos, scored by exact match.

Models with a closed vocabulary count answers outside it as wrong; generated ones need none.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.benchmarks.one_word_files import FILE, SPLITS, read_one_word_files
from flamingo_jax.evaluation.prompts import QUESTION


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions of a split."""
    videos = MediaFolder(folder / "video")
    return read_one_word_files(folder, split, lambda number: videos.clip(f"video{number}"))


MSRVTTQA = BenchmarkSet(
    name="msrvttqa",
    title="MSRVTT-QA",
    layout={
        FILE.format("{train,val,test}"): "questions and answers",
        "video/": "videos video0.mp4, ...",
    },
    kind="generate",
    template=QUESTION,
    scorer="exact",
    read=read,
    splits=SPLITS,
    support="train",
    video=True,
)
