"""Reads Karpathy's splits of captioned images (Karpathy and Fei-Fei 2015)."""

import pathlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.scoring import files


class KarpathyImage(NamedTuple):
    """An image of the file.

    place: how an error names its record.
    captions: as their annotators wrote them; the file's `tokens` are lowercased words of them.
    record: the image's other fields.
    """

    place: str
    filename: str
    captions: tuple[str, ...]
    record: dict[str, object]


def read_images(path: pathlib.Path, splits: Collection[str]) -> Iterator[KarpathyImage]:
    """Yields the images of `splits` in the file's order: {"images": [{"split", "filename",
    "sentences": [{"raw"}]}]}.

    Raises: UserError for a missing or malformed file, and for an image without a caption.
    """
    content = files.as_dict(files.read_json(str(path)), str(path))
    for number, record in enumerate(files.field(content, "images", str(path), list)):
        where = f"{path}, image {number},"
        if files.field(record, "split", where, str) in splits:
            sentences = files.field(record, "sentences", where, list)
            captions = tuple(files.field(one, "raw", where, str) for one in sentences)
            if not captions:
                raise UserError(f"{where} has no sentences: each image needs a caption")
            name = files.field(record, "filename", where, str)
            yield KarpathyImage(where, name, captions, record)
