"""COCO captions on Karpathy's splits (Karpathy and Fei-Fei 2015)."""

import pathlib

from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files

ANNOTATIONS = "dataset_coco.json"
SPLITS = {"test": ("test",), "val": ("val",), "train": ("train", "restval")}
"""Names here -> names in the file: `restval` are images of val2014 that are trained on."""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads Karpathy's file; captions are as their annotators wrote them."""
    place = str(folder / ANNOTATIONS)
    content = files.as_dict(files.read_json(place), place)
    folders: dict[str, MediaFolder] = {}
    examples = []
    for number, entry in enumerate(files.field(content, "images", place, list)):
        where = f"{place}, image {number},"
        if files.field(entry, "split", where, str) not in SPLITS[split]:
            continue
        path = files.field(entry, "filepath", where, str)
        if path not in folders:
            folders[path] = MediaFolder(folder / path)
        sentences = files.field(entry, "sentences", where, list)
        examples.append(
            BenchmarkExample(
                str(files.field(entry, "cocoid", where, int)),
                folders[path].image(files.field(entry, "filename", where, str)),
                tuple(files.field(sentence, "raw", where, str) for sentence in sentences),
            )
        )
    return SplitContent(examples, [folder / ANNOTATIONS])


COCO = BenchmarkSet(
    name="coco",
    title="COCO captions",
    layout={
        ANNOTATIONS: "Karpathy's splits",
        "train2014/": "images COCO_train2014_000000000009.jpg, ...",
        "val2014/": "images COCO_val2014_000000000042.jpg, ...",
    },
    kind="generate",
    template=CAPTION,
    scorer="captions",
    read=read,
    splits=tuple(SPLITS),
    support="train",
    submission="captions",
)
