"""The TFDS features of each kind of dataset, its splits, and where its files are.

| kind | fields |
| --- | --- |
| pages | `id`, `texts` (k + 1 strings), `images` (k images); text i is before image i,
the last one after all |
| pairs | `id`, `image`, `captions` (one is drawn each epoch) |
| videos | `id`, `frames` (at `fps` frames a second), `fps`, `captions` |
| text | `id`, `text` |
| questions | `id`, `frames` (one for an image), `question`, `answers`, `type` |

Images are JPEG or PNG with three channels, the formats that TFDS stores.
"""

import pathlib
from typing import Any

import numpy as np

from flamingo_jax.dataset_identity import INFO_FILE, VERSION, find_dataset
from flamingo_jax.errors import UserError
from flamingo_jax.paths import require_mounted
from flamingo_jax.storage import modified

__all__ = ["INFO_FILE", "VERSION"]

KINDS = ("pages", "pairs", "videos", "text", "questions")
TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)
STATISTICS_FILE = "statistics.json"


def features(kind: str) -> Any:
    """Returns the `tfds.features.FeaturesDict` of a kind.

    Raises ValueError for a kind that is not in KINDS.
    """
    # Imported here because it takes half a second, which commands without data save.
    import tensorflow_datasets as tfds

    text, sequence = tfds.features.Text, tfds.features.Sequence

    def image() -> Any:
        return tfds.features.Image(shape=(None, None, 3))

    fields: dict[str, dict[str, Any]] = {
        "pages": {"texts": sequence(text()), "images": sequence(image())},
        "pairs": {"image": image(), "captions": sequence(text())},
        "videos": {
            "frames": sequence(image()),
            "fps": tfds.features.Scalar(np.float32),
            "captions": sequence(text()),
        },
        "text": {"text": text()},
        "questions": {
            "frames": sequence(image()),
            "question": text(),
            "answers": sequence(text()),
            "type": text(),
        },
    }
    if kind not in fields:
        raise ValueError(f"there is no kind {kind!r} of dataset; choose one of {', '.join(KINDS)}")
    return tfds.features.FeaturesDict({"id": text(), **fields[kind]})


def kind_of(fields: Any) -> str:
    """Infers a dataset's kind from the names of its features."""
    for name, kind in (
        ("texts", "pages"),
        ("image", "pairs"),
        ("fps", "videos"),
        ("question", "questions"),
    ):
        if name in fields:
            return kind
    return "text"


def dataset_folder(path: str | pathlib.Path) -> pathlib.Path:
    """Finds the folder that `tfds.builder_from_directory` opens: `path` or its version folder
    `path/1.0.0`.

    Raises: UserError where neither is a finished dataset.
    """
    require_mounted(str(path), "a dataset's path")
    folder = find_dataset(path)
    if folder is None:
        raise UserError(
            f"{path} holds no dataset: build one there with launch.build_data, or mend the path"
        )
    return folder


def is_current(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Returns whether a file derived from the dataset in `folder` exists and is not older than
    it.
    """
    made = modified(path)
    return made is not None and made >= (modified(folder / INFO_FILE) or made)
