"""STAR (Wu et al. 2021): situated reasoning on clips of Charades, with four answers to each
question.

The answers of its test split are hidden on a server, so that queries are by default of `val`,
as in later work; the paper reports `test`.
"""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import QUESTION
from flamingo_jax.evaluation.scoring import files

VIDEOS = "Charades_v1_480"
TYPES = ("Interaction", "Sequence", "Prediction", "Feasibility")


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads a split. A question's type is the beginning of its id. `situations`, which hold what
    happens in the clip, and the programs are not read.
    """
    place = folder / f"STAR_{split}.json"
    videos = MediaFolder(folder / VIDEOS)
    examples = []
    for number, entry in enumerate(files.as_list(files.read_json(str(place)), str(place))):
        where = f"{place}, question {number},"
        name = files.field(entry, "question_id", where, str)
        kind = name.partition("_")[0]
        if kind not in TYPES:
            raise UserError(f"{where} has the id {name!r}, which begins with no type of question")
        choices = tuple(
            files.field(one, "choice", where, str)
            for one in files.field(entry, "choices", where, list)
        )
        answer = files.field(entry, "answer", where, str)
        if answer not in choices:
            raise UserError(f"{where} has an answer that is none of its choices: {answer!r}")
        video = files.field(entry, "video_id", where, str)
        start = float(files.field(entry, "start", where, int, float))
        end = float(files.field(entry, "end", where, int, float))
        examples.append(
            BenchmarkExample(
                name,
                videos.clip(video, start, end),
                (answer,),
                files.field(entry, "question", where, str),
                kind,
                video,
                choices,
            )
        )
    return SplitContent(examples, [place])


STAR = BenchmarkSet(
    name="star",
    title="STAR",
    layout={
        "STAR_{val,train}.json": "questions with four answers each",
        f"{VIDEOS}/": "videos of Charades at 480p 6H78U.mp4, ...",
    },
    kind="rank",
    template=QUESTION,
    scorer="mean_of_types",
    read=read,
    splits=("val", "train"),
    support="train",
    video=True,
)
