"""Source `coco`: converts captions in COCO's format to image-text pairs.

The JSON files have `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from data_pipelines.build.captions import NO_CAPTION, Texts, file_name, why_no_text
from data_pipelines.build.files import existing_folder
from data_pipelines.build.images import ANY_IMAGE, ImageRules, UnusableImage
from data_pipelines.build.input_files import InputFile, files_in, folders_of, read_named
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
    SplitRecord,
    record_id,
)
from data_pipelines.build.text_files import NOT_A_TEXT, NOT_UTF8, as_utf8, decode, parsed
from flamingo_jax.errors import UserError

BAD_IMAGE = "image without an id and a file name"
REPEATED_ID = "image of an id that another has"
BAD_ANNOTATION = "annotation without a caption for one of the images"


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """An image with its captions.

    id: of the record. name: the image's file name. folders: where to look for it.
    no_captions: the reason for each caption that is unusable.
    bad: the reason why the entry gives no record, "" if it does.
    """

    id: str
    name: str = ""
    folders: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    no_captions: tuple[str, ...] = ()
    bad: str = ""

    def __str__(self) -> str:
        return self.id


@dataclasses.dataclass(frozen=True)
class Coco:
    """Reads captions in COCO's format, one record per image with all its captions.

    inputs: the JSON files.
    images: folders to look for the images in, in this order; by default those of the JSON
      files.
    """

    inputs: tuple[str, ...]
    images: tuple[str, ...] = ()
    shares: SplitFractions = DEFAULT_SHARES
    rules: ImageRules = ANY_IMAGE

    @property
    def kind(self) -> str:
        return "pairs"

    @property
    def about(self) -> str:
        return "Images with captions in COCO's format."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[CocoImage]:
        """Lists the images of all files, and bad images and annotations."""
        for folder in self.images:
            existing_folder(folder, "--images")
        return [
            entry
            for file in files_in(self.inputs, (".json",), "annotation file")
            for entry in self._entries(file)
        ]

    def convert(self, entry: CocoImage) -> list[Converted]:
        """Reads one image as a record, or gives the reason why it was dropped."""
        if entry.bad:
            return [DroppedRecord(entry.bad)]
        lost = entry.no_captions
        if not entry.captions:
            return [DroppedRecord(NO_CAPTION, texts_dropped=lost)]
        try:
            image = self.rules.store(read_named(entry.folders, entry.name))
        except UnusableImage as error:
            return [DroppedRecord(str(error), texts_dropped=lost)]
        fields = {"id": entry.id, "image": image, "captions": list(entry.captions)}
        return [SplitRecord(self.shares.split(entry.id), fields, texts_dropped=lost)]

    def _entries(self, file: InputFile) -> list[CocoImage]:
        """Joins the images and annotations of one JSON file by image id."""
        try:
            content = parsed(decode(file.path.read_bytes()))
            images, annotations = content["images"], content["annotations"]
            if not isinstance(images, list) or not isinstance(annotations, list):
                raise TypeError("no lists")
        except (OSError, KeyError, TypeError) as error:
            raise UserError(
                f'{file.path} is no COCO caption file (JSON with lists "images" and'
                ' "annotations"): mend it or take it out of --input'
            ) from error
        names: dict[str, str] = {}
        bad = []
        for image in images:
            try:
                number, name = _id(image["id"]), file_name(image["file_name"])
                if names.get(number, name) != name:
                    bad.append(REPEATED_ID)
                names[number] = name
            except (KeyError, TypeError):
                bad.append(BAD_IMAGE)
        captions = dict.fromkeys(names, Texts())
        for annotation in annotations:
            try:
                number, caption = _id(annotation["image_id"]), annotation["caption"]
                reason = why_no_text(caption)
                if number not in names or reason == NOT_A_TEXT:
                    bad.append(BAD_ANNOTATION)
                elif reason == NOT_UTF8:
                    bad.append(NOT_UTF8)
                else:
                    texts = Texts(lost=(reason,)) if reason else Texts((as_utf8(caption),))
                    captions[number] = captions[number].and_(texts)
            except (KeyError, TypeError):
                bad.append(BAD_ANNOTATION)
        folders = self.images or folders_of((str(file.path),))
        seen: set[str] = set()
        made = []
        for number, name in names.items():
            # Two images with the same name: append the id, so that record ids are unique.
            name_id = record_id(
                self.inputs, file.root, f"{name}#{number}" if name in seen else name
            )
            made.append(CocoImage(name_id, name, folders, *captions[number]))
            seen.add(name)
        return made + [CocoImage(file.name, bad=reason) for reason in bad]


def _id(value: Any) -> str:
    """Normalises an image id, which files write as 1, "1" or, exported from a table, as 1.0.

    Raises: TypeError for another type.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) not in (int, str):
        raise TypeError("no id")
    return str(value)
