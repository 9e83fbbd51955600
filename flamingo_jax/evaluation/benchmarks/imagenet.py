"""ImageNet (ILSVRC2012): 1,000 classes, as few-shot classification by their names."""

import os
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder, plain_name
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ImageFile
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files
from flamingo_jax.evaluation.selection.shots import draw

NAMES = "classnames.txt"
SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12/data"
TRAIN_DRAWN = 128
"""Images of each class in `train` that shots are chosen from: drawn once from the 1.28 million,
whose examples would fill the memory of the host.
"""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads a split: images in folders named by WordNet id, or of `val` in one folder, with their
    classes from Kaggle's LOC_val_solution.csv or from the development kit.

    The class names are the user's choice, a line `n01440764 tench` for each: the paper does not
    say its own. CLIP's, in the form of CoOp's classnames.txt, name two pairs of classes alike.
    """
    names = class_names(folder / NAMES)
    folders = (folder / split / wnid for wnid in names)
    used = [folder / NAMES]
    if split == "val" and not any(map(os.path.isdir, folders)):
        found = list(_flat(folder, names, used))
    else:
        found = list(_by_folder(folder / split, names, TRAIN_DRAWN if split == "train" else 0))
    examples = [
        BenchmarkExample(image.path.stem, image, (names[wnid],), details={"wnid": wnid})
        for wnid, image in found
    ]
    return SplitContent(examples, used, list(names.values()))


def class_names(place: pathlib.Path) -> dict[str, str]:
    """Reads {WordNet id: name of the class}.

    Raises: UserError where a line has no name, or two classes have one: no answer could tell
      them apart.
    """
    names: dict[str, str] = {}
    by_name: dict[str, str] = {}
    for number, line in enumerate(files.read_text(str(place)).splitlines(), 1):
        wnid, _, name = line.strip().partition(" ")
        if not line.strip():
            continue
        if not name.strip() or wnid in names:
            raise UserError(f"{place}, line {number}, must be a WordNet id of its own and a name")
        names[wnid] = name.strip()
        if names[wnid] in by_name:
            raise UserError(
                f"{place} names {by_name[names[wnid]]} and {wnid} both {names[wnid]!r}, which no"
                " answer could tell apart: give each class a name of its own"
            )
        by_name[names[wnid]] = wnid
    return names


def _by_folder(
    folder: pathlib.Path, names: Mapping[str, str], most: int
) -> Iterator[tuple[str, ImageFile]]:
    """Yields the images of each class's folder, `most` of each, drawn at random."""
    for wnid in names:
        images = MediaFolder(folder / wnid)
        ordered = sorted(name for name in images.names if name.lower().endswith((".jpeg", ".jpg")))
        for place in draw(0, wnid, len(ordered), most):
            yield wnid, images.image(ordered[place])


def _flat(
    folder: pathlib.Path, names: Mapping[str, str], used: list[pathlib.Path]
) -> Iterator[tuple[str, ImageFile]]:
    """Yields the images of val/, and adds the files that tell their classes to `used`."""
    images = MediaFolder(folder / "val")
    if (folder / SOLUTION).is_file():
        used.append(folder / SOLUTION)
        rows = files.read_csv(str(folder / SOLUTION), ("ImageId", "PredictionString"))
        # A class and a box for each object, all of one class.
        classes = {row["ImageId"]: row["PredictionString"].split(" ")[0] for row in rows}
    else:
        classes = _devkit(folder / DEVKIT, used)
    counts: dict[str, int] = defaultdict(int)
    for name, wnid in sorted(classes.items()):
        counts[wnid] += 1
        if wnid not in names:
            raise UserError(f"{folder / NAMES} has no name for {wnid}, the class of {name}: add it")
        yield wnid, images.image(f"{plain_name(name)}.JPEG")


def _devkit(folder: pathlib.Path, used: list[pathlib.Path]) -> dict[str, str]:
    """Reads {image: WordNet id} from the development kit, whose numbers of classes are its own,
    in meta.mat, and not the places of the sorted ids.
    """
    truths, meta = folder / "ILSVRC2012_validation_ground_truth.txt", folder / "meta.mat"
    if not truths.is_file() or not meta.is_file():
        raise UserError(
            f"nothing tells the classes of the images in {folder.parent.parent / 'val'}: put them"
            f" into folders by WordNet id, or {SOLUTION} or {DEVKIT}/ beside it"
        )
    import scipy.io

    used += [truths, meta]
    try:
        synsets = scipy.io.loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UserError(f"{meta} is not the development kit's: {error}") from None
    found = {}
    for number, line in enumerate(files.read_text(str(truths)).split(), 1):
        if not line.isdecimal() or int(line) not in wnids:
            raise UserError(f"{truths}, line {number}, is no number of a class: {line[:80]!r}")
        found[f"ILSVRC2012_val_{number:08d}"] = wnids[int(line)]
    return found


IMAGENET = BenchmarkSet(
    name="imagenet",
    title="ImageNet",
    layout={
        NAMES: "a line for each class: its WordNet id, a space and its name",
        "val/": "images by class n01440764/ILSVRC2012_val_00000293.JPEG, ..., or all in it",
        "train/": "images by class n01440764/n01440764_10026.JPEG, ...",
        SOLUTION: "the classes of val, where all images are in it: Kaggle's",
        f"{DEVKIT}/": "or the development kit's",
    },
    kind="rank",
    template=CAPTION,
    scorer="top_k",
    read=read,
    splits=("val", "train"),
    support="train",
    shots=(8, 16),
    per_class=32,
)
