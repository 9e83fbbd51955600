"""The base class of `image_folder` and `video_folder`: a folder of files and a JSONL of
captions.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

from data_pipelines.build.captions import NO_CAPTION, caption_file, read_captions
from data_pipelines.build.files import FileRefused, NameResolver, existing_folder, find, walk
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
    SplitRecord,
    record_id,
)


@dataclasses.dataclass(frozen=True)
class CaptionedFile:
    """A file and its captions.

    folder: the input folder. name: relative to it; "" for a bad line of the caption file.
    no_captions: the reason for each caption that is unusable.
    bad: the reason why the entry gives no record, "" if it does.
    """

    folder: str
    name: str = ""
    captions: tuple[str, ...] = ()
    no_captions: tuple[str, ...] = ()
    bad: str = ""

    def __str__(self) -> str:
        return self.name


class Unusable(ValueError):
    """Raised for a file that gives no record; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class CaptionedFolder:
    """Makes a record of each file in the caption file; files of a known type without a line
    are counted as dropped.

    key: the field of a line with the file's name.
    caption_files: the caption file's default names.
    suffixes: the known types of files.
    captions: the caption file's name, if it is another.
    """

    key: ClassVar[str]
    caption_files: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[frozenset[str]]

    folders: tuple[str, ...]
    shares: SplitFractions = DEFAULT_SHARES
    captions: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[CaptionedFile]:
        """Lists files with captions, files without, and bad lines of the caption files."""
        return [entry for folder in self.folders for entry in self._entries(folder)]

    def convert(self, entry: CaptionedFile) -> list[Converted]:
        """Reads one file as a record, or gives the reason why it was dropped."""
        if entry.bad:
            return [DroppedRecord(entry.bad)]
        folder, texts_lost = pathlib.Path(entry.folder), entry.no_captions
        try:
            file = find((folder,), entry.name, self.folders)
        except FileRefused as error:
            return [DroppedRecord(str(error), texts_dropped=texts_lost)]
        if not entry.captions:
            return [DroppedRecord(NO_CAPTION, texts_dropped=texts_lost)]
        try:
            fields, lost = self.read(file)
        except Unusable as error:
            return [DroppedRecord(str(error), texts_dropped=texts_lost)]
        name = record_id(self.folders, folder, entry.name)
        fields = {"id": name, "captions": list(entry.captions), **fields}
        return [SplitRecord(self.shares.split(name), fields, lost, texts_lost)]

    def read(self, file: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Reads a file: (the record's fields with its images, the reason for each image left
        out).

        Raises: Unusable with the reason where it gives no record.
        """
        raise NotImplementedError

    def _entries(self, folder: str) -> list[CaptionedFile]:
        """Joins the caption file of one folder with the files below it."""
        root = existing_folder(folder)
        line = f'{{"{self.key}": "path/below/the/folder", "captions": ["a cat"]}}'
        caption_lines = caption_file(root, self.captions, self.caption_files, line)
        listing = walk(root, given=self.folders)
        captions, bad = read_captions(caption_lines, self.key, NameResolver(root, listing.names))
        listed = listing.ending(self.suffixes)
        entries = [CaptionedFile(folder, name, *texts) for name, texts in captions.items()]
        entries += [CaptionedFile(folder, name) for name in listed.names if name not in captions]
        entries += [
            CaptionedFile(folder, refused.name, bad=refused.reason)
            for refused in listed.refused
            if refused.name not in captions
        ]
        return entries + [CaptionedFile(folder, bad=reason) for reason in bad]
