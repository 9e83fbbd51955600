"""VizWiz (Gurari et al. 2018): photographs and questions of blind people.

The paper asks test-dev, whose answers the owners keep: ask split `test` and submit the
predictions (`scoring.submission`). OpenFlamingo and IDEFICS ask `val`, as here by default. It is
scored by its own evaluation; OpenFlamingo uses that of VQAv2.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.annotators import answered
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import QUESTION
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.questions import read_annotated

SPLITS = ("val", "test", "train")


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions of a split, and the answers, which `test` is without. An image has one
    question, whose id is the image's name.
    """
    place = folder / "Annotations" / f"{split}.json"
    images = MediaFolder(folder / split)
    examples = []
    for number, entry in enumerate(files.as_list(files.read_json(str(place)), str(place))):
        where = f"{place}, entry {number},"
        key = files.field(entry, "image", where, str)
        media, question = images.image(key), files.field(entry, "question", where, str)
        if split == "test" and not entry.get("answers"):
            examples.append(BenchmarkExample(key, media, (), question))
        else:
            truth = read_annotated(entry, key, where)
            examples.append(answered(key, media, question, truth))
    return SplitContent(examples, [place])


VIZWIZ = BenchmarkSet(
    name="vizwiz",
    title="VizWiz",
    layout={
        "Annotations/{train,val,test}.json": "questions and answers",
        "train/": "images VizWiz_train_00000000.jpg, ...",
        "val/": "images VizWiz_val_00000000.jpg, ...",
        "test/": "images VizWiz_test_00000000.jpg, ...",
    },
    kind="generate",
    template=QUESTION,
    scorer="vqa",
    scorer_options={"variant": "vizwiz"},
    read=read,
    splits=SPLITS,
    support="train",
    submission="vizwiz",
)
