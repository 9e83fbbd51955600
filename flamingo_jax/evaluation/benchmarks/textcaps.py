"""TextCaps: captions that tell what is written in an image (Sidorov et al. 2020). It is not among
the paper's benchmarks.
"""

import pathlib

from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files

SPLITS = {"val": "train_images", "train": "train_images", "test": "test_images"}
"""Split -> the folder of its images: those of val are among the training images, as in TextVQA.
The captions of test are kept by the authors, whose server scores it.
"""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the owners' file: {"data": [{"image_id", "caption_str"}]}, a record for each caption.
    The captions of an image are together its references.
    """
    path = folder / f"TextCaps_0.1_{split}.json"
    place = str(path)
    content = files.as_dict(files.read_json(place), place)
    captions: dict[str, list[str]] = {}
    for number, record in enumerate(files.field(content, "data", place, list)):
        where = f"{place}, entry {number},"
        image = files.field(record, "image_id", where, str)
        some = captions.setdefault(image, [])
        if split != "test" or record.get("caption_str"):
            some.append(files.field(record, "caption_str", where, str))
    images = MediaFolder(folder / SPLITS[split])
    examples = [
        BenchmarkExample(image, images.image(f"{image}.jpg"), tuple(some))
        for image, some in captions.items()
    ]
    return SplitContent(examples, [path])


TEXTCAPS = BenchmarkSet(
    name="textcaps",
    title="TextCaps",
    layout={
        "TextCaps_0.1_{val,train,test}.json": "captions; of test the images alone",
        "train_images/": "images of val and train, 0000599864fd15b3.jpg, ...",
        "test_images/": "images of test",
    },
    kind="generate",
    template=CAPTION,
    scorer="captions",
    read=read,
    splits=tuple(SPLITS),
    support="train",
    submission="textcaps",
)
