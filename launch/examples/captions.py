"""Reads a folder of images and captions, in the format of `launch.build_data image_folder`."""

import json
import pathlib
from typing import NamedTuple

import flamingo_jax as fj


class Captioned(NamedTuple):
    """Holds an image and its caption."""

    image: fj.Image
    caption: str


def read_captions(folder: str) -> list[Captioned]:
    """Reads the images of `captions.jsonl`, each with its first caption. A line is
    {"image": "dog.jpg", "captions": ["A dog."]}.

    Raises: UserError for a malformed line, or an image that cannot be read.
    """
    path = pathlib.Path(folder) / "captions.jsonl"
    if not path.is_file():
        raise fj.UserError(f"{path} is not there: write a line for each image into it")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
            name, caption = record["image"], record["captions"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise fj.UserError(
                f'{path}, line {number}: write {{"image": "dog.jpg", "captions": ["A dog."]}}'
            ) from error
        found.append(Captioned(fj.Image(path.parent / name), caption))
    return found
