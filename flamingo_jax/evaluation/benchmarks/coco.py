"""COCO captions on Karpathy's splits (Karpathy and Fei-Fei 2015)."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.karpathy import read_images
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.captions import read_references

ANNOTATIONS = "dataset_coco.json"
OFFICIAL = "annotations/captions_val2014.json"
SPLITS = {
    "test": ("test",),
    "val": ("val",),
    "train": ("train", "restval"),
    "train2014": ("train",),
}
"""Names here -> names in the file. `restval` are the 30,504 images of val2014 that are in neither
test nor val: papers train on them, so that they are shots here; open_flamingo leaves them out, as
`train2014` does.
"""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads Karpathy's file.

    The references of test and val are COCO's own file of val2014, which the official scorer
    reads, where the folder has it; else the captions in Karpathy's file, which are copies of
    them. Shots are always the first caption in Karpathy's file, as in open_flamingo.

    Raises: UserError for a missing or malformed file, and where the two files disagree on what
      images there are.
    """
    read_from = [folder / ANNOTATIONS]
    official = {}
    if split in ("test", "val") and (folder / OFFICIAL).exists():
        read_from.append(folder / OFFICIAL)
        official = read_references(str(folder / OFFICIAL))
    folders: dict[str, MediaFolder] = {}
    examples = []
    for image in read_images(folder / ANNOTATIONS, SPLITS[split]):
        path = files.field(image.record, "filepath", image.place, str)
        if path not in ("train2014", "val2014"):
            raise UserError(f"{image.place} is in {path!r}, but COCO has train2014 and val2014")
        if path not in folders:
            folders[path] = MediaFolder(folder / path)
        number = files.field(image.record, "cocoid", image.place, int)
        captions = image.captions
        if official:
            if number not in official:
                raise UserError(f"{image.place} is {number}, which {folder / OFFICIAL} lacks")
            captions = tuple(official[number])
        media = folders[path].image(image.filename)
        examples.append(BenchmarkExample(str(number), media, captions))
    return SplitContent(examples, read_from)


COCO = BenchmarkSet(
    name="coco",
    title="COCO captions",
    layout={
        ANNOTATIONS: "Karpathy's splits",
        OFFICIAL: "COCO's own references of test and val; may be left out",
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
