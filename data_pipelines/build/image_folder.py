"""Source `image_folder`: converts a folder of images and a captions.jsonl to image-text pairs.

`captions.jsonl` has one line per image, `{"image": "any/where/below.jpg", "captions": ["...",
...]}` or `{"image": ..., "caption": "..."}`.
"""

import dataclasses
import pathlib
from typing import Any, ClassVar

from data_pipelines.build.captioned_folder import CaptionedFolder, Unusable
from data_pipelines.build.files import read
from data_pipelines.build.images import ANY_IMAGE, ImageRules, UnusableImage


@dataclasses.dataclass(frozen=True)
class ImageFolder(CaptionedFolder):
    """Reads images with captions, one record per image; see `CaptionedFolder`."""

    key: ClassVar[str] = "image"
    caption_files: ClassVar[tuple[str, ...]] = ("captions.jsonl",)
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
    )

    rules: ImageRules = ANY_IMAGE

    @property
    def kind(self) -> str:
        return "pairs"

    @property
    def about(self) -> str:
        return "Images with captions."

    def read(self, file: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Reads an image as a record's fields, and no warnings; raises Unusable."""
        try:
            return {"image": self.rules.store(read(file))}, ()
        except UnusableImage as error:
            raise Unusable(str(error)) from error
