"""NoCaps: captions of objects that COCO's captions name (in-domain), name in part (near-domain)
or do not name (out-domain) (Agrawal et al. 2019). It is not among the paper's benchmarks.

It has no training captions: its authors train on COCO's, so that shots are COCO's here.
"""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.coco import COCO
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.scoring.captions import read_references

FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
DOMAINS = ("in-domain", "near-domain", "out-domain")
SHOTS = "coco-train"


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the 4,500 images of `val` with 10 captions each, in COCO's form, whose images have a
    file_name and a domain besides; or COCO's training split. The captions and domains of the
    10,600 images of `test` are kept by the authors, whose server scores it.
    """
    if split == SHOTS:
        return COCO.read(coco_folder(folder), COCO.support)
    path = folder / FILES[split]
    place = str(path)
    captions = read_references(place) if split == "val" else {}
    images = MediaFolder(folder / split)
    examples = []
    content = files.as_dict(files.read_json(place), place)
    for number, record in enumerate(files.field(content, "images", place, list)):
        where = f"{place}, image {number},"
        domain = files.field(record, "domain", where, str) if captions else ""
        if captions and domain not in DOMAINS:
            raise UserError(f"{where} is of domain {domain!r}, not one of {', '.join(DOMAINS)}")
        key = files.field(record, "id", where, int)
        media = images.image(files.field(record, "file_name", where, str))
        examples.append(
            BenchmarkExample(str(key), media, tuple(captions.get(key, ())), question_type=domain)
        )
    return SplitContent(examples, [path])


def coco_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns COCO's folder: in NoCaps' own, or beside it.

    Raises: UserError where it is in neither.
    """
    places = (folder / COCO.name, folder.absolute().parent / COCO.name)
    for place in places:
        if place.is_dir():
            return place
    raise UserError(
        f"NoCaps takes its shots from COCO, but there is no folder {places[0]} or {places[1]}: put"
        f" COCO's files or a link to them there"
    )


NOCAPS = BenchmarkSet(
    name="nocaps",
    title="NoCaps",
    layout={
        FILES["val"]: "captions of the validation images",
        FILES["test"]: "the test images",
        "val/, test/": "images 0013ea2087020901.jpg, ...",
        f"{COCO.name}/": "the files of the benchmark coco, or a link to them; beside this folder,"
        " it is found too",
    },
    kind="generate",
    template=CAPTION,
    scorer="captions",
    read=read,
    splits=(*FILES, SHOTS),
    support=SHOTS,
    submission="captions",
    scorer_options={"by_type": True},
)
