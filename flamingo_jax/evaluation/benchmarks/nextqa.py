"""NExT-QA with open-ended answers (Xiao et al. 2021), scored by WUPS as NExT-OE's eval_oe.py
does, which needs WordNet 3.0.

Test questions have a second answer; the better match counts.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.vidor import MAPPING, VIDEOS, VidorVideos
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import QUESTION
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.wups import read_video_answers

SPLITS = ("test", "val", "train")
_SECOND = "add_reference_answer_{}.json"
_COLUMNS = ("video", "question", "answer", "qid", "type")


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions of a split."""
    place, more = folder / f"{split}.csv", folder / _SECOND.format(split)
    # Only test has second answers: without its file, scores would be lower.
    second = split == "test" or more.is_file()
    others = read_video_answers(str(more)) if second else {}
    videos = VidorVideos(folder)
    examples = []
    for row in files.read_csv(str(place), _COLUMNS):
        key = row["video"], row["qid"]
        examples.append(
            BenchmarkExample(
                "_".join(key),
                videos.clip(row["video"]),
                (row["answer"], *([others[key]] if key in others else [])),
                row["question"],
                row["type"],
                row["video"],
            )
        )
    return SplitContent(examples, [place, *([more] if second else [])])


NEXTQA = BenchmarkSet(
    name="nextqa",
    title="NExT-QA (open-ended)",
    layout={
        "{train,val,test}.csv": "questions and answers, of NExT-OE",
        _SECOND.format("test"): "second answers",
        VIDEOS + "/": "videos 4924794333.mp4, ..., or VidOR's folders 1164/4924794333.mp4, ...",
        MAPPING: "VidOR's folder of each video; optional",
    },
    kind="generate",
    template=QUESTION,
    scorer="wups",
    read=read,
    splits=SPLITS,
    support="train",
    video=True,
    submission="nextqa",
)
