"""iVQA (Yang et al. 2021): questions about parts of instructional videos, five answers each.

A shot shows the most frequent of the five. The published models choose among the answers that
the training set has twice; generated ones need no such list.
"""

import math
import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.annotators import shown_first
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ClipFile
from flamingo_jax.evaluation.prompts import QUESTION
from flamingo_jax.evaluation.scoring import files

SPLITS = ("test", "val", "train")
_ANSWERS = tuple(f"answer{number}" for number in range(1, 6))
_COLUMNS = ("video_id", "start", "end", "question", *_ANSWERS)


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions of a split. Rows have no ids: their number is added to the video's."""
    place = folder / f"{split}.csv"
    videos = MediaFolder(folder / "video")
    examples = []
    for number, row in enumerate(files.read_csv(str(place), _COLUMNS), 2):
        where = f"{place}, row {number},"
        answers = [row[column] for column in _ANSWERS if row[column].strip()]
        if not answers:
            raise UserError(f"{where} has no answer")
        examples.append(
            BenchmarkExample(
                f"{row['video_id']}_{number}",
                _clip(videos, row, where),
                shown_first(answers),
                row["question"],
                cluster=row["video_id"],
            )
        )
    return SplitContent(examples, [place])


def _clip(videos: MediaFolder, row: dict[str, str], where: str) -> ClipFile:
    """Finds the part that a question is about: a file of its own, or seconds of the video."""
    video, start, end = row["video_id"], row["start"], row["end"]
    try:
        seconds = float(start), float(end)
        if not all(map(math.isfinite, seconds)):
            raise ValueError("not finite")
    except ValueError:
        raise UserError(f"{where} has a start or end that is no number of seconds") from None
    own = videos.clip(f"{video}_{start}_{end}")
    return own if own.there else videos.clip(video, *seconds)


IVQA = BenchmarkSet(
    name="ivqa",
    title="iVQA",
    layout={
        "{train,val,test}.csv": "questions and answers",
        "video/": "videos <video_id>.mp4, or their parts <video_id>_<start>_<end>.mp4",
    },
    kind="generate",
    template=QUESTION,
    scorer="ivqa",
    read=read,
    splits=SPLITS,
    support="train",
    video=True,
)
