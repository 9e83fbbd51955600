"""Captions in COCO's format to a dataset of pairs: JSON files with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`)."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from data_pipelines.build.captions import NO_CAPTION, NotUtf8, as_utf8
from data_pipelines.build.files import existing_folder
from data_pipelines.build.pictures import ANY_PICTURE, PictureRules, Unfit
from data_pipelines.build.shards import Found, files_in, folders_of, read_named
from data_pipelines.build.source import DEFAULT_SHARES, Dropped, Example, Outcome, Shares, record_id
from flamingo_jax.errors import UserError

BAD_IMAGE = "image without an id and a file name"
BAD_ANNOTATION = "annotation without a caption for one of the images"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A picture by the folders it may lie in, its name and captions, or what is of no use in a file: `bad` says why."""

    id: str
    name: str = ""
    folders: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    bad: str = ""

    def __str__(self) -> str:
        return self.id


@dataclasses.dataclass(frozen=True)
class Coco:
    """inputs: the JSON files. images: folders that hold the pictures, by default those of the files; the first with such a name is taken."""

    inputs: tuple[str, ...]
    images: tuple[str, ...] = ()
    shares: Shares = DEFAULT_SHARES
    rules: PictureRules = ANY_PICTURE

    @property
    def kind(self) -> str:
        return "pairs"

    @property
    def about(self) -> str:
        return "Pictures with captions in COCO's format."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[Entry]:
        for folder in self.images:
            existing_folder(folder, "--images")
        return [entry for file in files_in(self.inputs, (".json",), "annotation file") for entry in self._entries(file)]

    def convert(self, entry: Entry) -> list[Outcome]:
        if entry.bad:
            return [Dropped(entry.bad)]
        if not entry.captions:
            return [Dropped(NO_CAPTION)]
        try:
            image = self.rules.store(read_named(entry.folders, entry.name))
        except Unfit as error:
            return [Dropped(str(error))]
        return [Example(self.shares.split(entry.id), {"id": entry.id, "image": image, "captions": list(entry.captions)})]

    def _entries(self, file: Found) -> list[Entry]:
        try:
            content = json.loads(file.path.read_bytes().decode("utf-8-sig", "surrogateescape"))
            images, annotations = content["images"], content["annotations"]
            if not isinstance(images, list) or not isinstance(annotations, list):
                raise TypeError("no lists")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f'{file.path} is no COCO caption file (JSON with lists "images" and "annotations"): mend it or take it out of --input'
            ) from error
        names: dict[Any, str] = {}
        bad = []
        for image in images:
            try:
                if not isinstance(image["file_name"], str):
                    raise TypeError("no name")
                names[image["id"]] = image["file_name"]
            except (KeyError, TypeError):
                bad.append(BAD_IMAGE)
        captions: dict[Any, list[str]] = {number: [] for number in names}
        for annotation in annotations:
            try:
                if caption := as_utf8(annotation["caption"]):
                    captions[annotation["image_id"]].append(caption)
            except NotUtf8 as error:
                bad.append(str(error))
            except (KeyError, TypeError, AttributeError):
                bad.append(BAD_ANNOTATION)
        folders = self.images or folders_of((str(file.path),))
        made = [Entry(record_id(self.inputs, file.root, name), name, folders, tuple(captions[number])) for number, name in names.items()]
        return made + [Entry(file.name, bad=reason) for reason in bad]
