"""TextVQA (Singh et al. 2019): questions about texts in images. The prompt has no text that was
read in the image otherwise (paper 3.1).

It is scored by its own evaluation; OpenFlamingo uses that of VQAv2.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.annotators import answered
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import QUESTION
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.questions import read_annotated

_FILE = "TextVQA_0.5.1_{}.json"
SPLITS = {"val": "train_images", "test": "test_images", "train": "train_images"}
"""{split: folder of its images}."""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions of a split, and the answers, which `test` is without."""
    place = folder / _FILE.format(split)
    content = files.as_dict(files.read_json(str(place)), str(place))
    images = MediaFolder(folder / SPLITS[split])
    examples = []
    for number, entry in enumerate(files.field(content, "data", str(place), list)):
        where = f"{place}, entry {number},"
        key = str(files.field(entry, "question_id", where, int))
        image = files.field(entry, "image_id", where, str)
        media, question = images.image(f"{image}.jpg"), files.field(entry, "question", where, str)
        if split == "test" and not entry.get("answers"):
            examples.append(BenchmarkExample(key, media, (), question, cluster=image))
        else:
            truth = read_annotated(entry, key, where)
            examples.append(answered(key, media, question, truth))
    return SplitContent(examples, [place])


TEXTVQA = BenchmarkSet(
    name="textvqa",
    title="TextVQA",
    layout={
        _FILE.format("{train,val,test}"): "questions and answers",
        "train_images/": "images of train and val, 0054c91397f2fe05.jpg, ...",
        "test_images/": "images of test",
    },
    kind="generate",
    template=QUESTION,
    scorer="vqa",
    scorer_options={"variant": "textvqa"},
    read=read,
    splits=tuple(SPLITS),
    support="train",
    submission="vqa",
)
