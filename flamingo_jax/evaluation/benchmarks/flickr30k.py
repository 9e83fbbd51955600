"""Flickr30k captions on Karpathy's splits: 29,000 images to train, 1,014 to validate and 1,000 to
test (Young et al. 2014, Karpathy and Fei-Fei 2015).

Copies of the set whose "test" split is all of its 31,783 images have other scores.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.karpathy import read_images
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import CAPTION

ANNOTATIONS = "dataset_flickr30k.json"
IMAGES = "flickr30k-images"


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads Karpathy's file. An image's id is its file's name without ".jpg", as in
    open_flamingo.
    """
    images = MediaFolder(folder / IMAGES)
    examples = [
        BenchmarkExample(
            pathlib.PurePath(image.filename).stem, images.image(image.filename), image.captions
        )
        for image in read_images(folder / ANNOTATIONS, (split,))
    ]
    return SplitContent(examples, [folder / ANNOTATIONS])


FLICKR30K = BenchmarkSet(
    name="flickr30k",
    title="Flickr30k captions",
    layout={ANNOTATIONS: "Karpathy's splits", f"{IMAGES}/": "images 1000092795.jpg, ..."},
    kind="generate",
    template=CAPTION,
    scorer="captions",
    read=read,
    splits=("test", "val", "train"),
    support="train",
)
