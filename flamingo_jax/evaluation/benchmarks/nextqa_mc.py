"""NExT-QA, multiple choice (Xiao et al. 2021): questions on causes, times and contents of videos
with five answers each.
"""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.vidor import MAPPING, VIDEOS, VidorVideos
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import QUESTION
from flamingo_jax.evaluation.scoring import files

OPTIONS = ("a0", "a1", "a2", "a3", "a4")


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads a split of the repository doc-doc/NExT-QA. Questions are as in the file, without a
    question mark; their ids are <video>_<qid>, as in the owners' eval_mc.py, which also counts
    questions on what came before (TP) with those on what came after (TN).
    """
    place = folder / f"{split}.csv"
    videos = VidorVideos(folder)
    examples = []
    columns = ("video", "question", "answer", "qid", "type", *OPTIONS)
    for number, row in enumerate(files.read_csv(str(place), columns), 2):
        where = f"{place}, row {number},"
        answer = files.whole_number(row, "answer", where)
        if not 0 <= answer < len(OPTIONS):
            raise UserError(f"{where} has the answer {answer}, which is not from 0 to 4")
        options = tuple(row[name] for name in OPTIONS)
        examples.append(
            BenchmarkExample(
                f"{row['video']}_{row['qid']}",
                videos.clip(row["video"]),
                (options[answer],),
                row["question"],
                "TN" if row["type"] == "TP" else row["type"],
                row["video"],
                options,
            )
        )
    return SplitContent(examples, [place])


NEXTQA_MC = BenchmarkSet(
    name="nextqa_mc",
    title="NExT-QA, multiple choice",
    layout={
        "{test,val,train}.csv": "questions with five answers each, of NExT-QA",
        f"{VIDEOS}/": "videos 4924794333.mp4, ..., or VidOR's folders 1164/4924794333.mp4, ...",
        MAPPING: "VidOR's folder of each video; optional",
    },
    kind="rank",
    template=QUESTION,
    scorer="choice",
    read=read,
    splits=("test", "val", "train"),
    support="train",
    video=True,
)
