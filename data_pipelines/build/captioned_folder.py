"""A folder of files with a caption file beside them, as a source: what images and videos have
in common.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

from data_pipelines.build.captions import NO_CAPTION, caption_file, read_captions
from data_pipelines.build.files import NameResolver, NoFile, existing_folder, find, walk
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    Shares,
    SplitRecord,
    record_id,
)


@dataclasses.dataclass(frozen=True)
class CaptionedFile:
    """One file of one of the folders with its captions, or what is of no use: `bad` says why.

    no_captions: for each caption that is of no use the reason.
    """

    folder: str
    name: str = ""
    captions: tuple[str, ...] = ()
    no_captions: tuple[str, ...] = ()
    bad: str = ""

    def __str__(self) -> str:
        return self.name


class Unusable(ValueError):
    """A file that gives no record; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class CaptionedFolder:
    """Records are the files named in the caption file; files of a known type that no line names
    are counted as dropped.
    """

    key: ClassVar[str]
    caption_files: ClassVar[tuple[str, ...]]
    suffixes: ClassVar[frozenset[str]]

    folders: tuple[str, ...]
    shares: Shares = DEFAULT_SHARES
    captions: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[CaptionedFile]:
        return [entry for folder in self.folders for entry in self._entries(folder)]

    def convert(self, entry: CaptionedFile) -> list[Converted]:
        if entry.bad:
            return [DroppedRecord(entry.bad)]
        folder, texts_lost = pathlib.Path(entry.folder), entry.no_captions
        try:
            file = find((folder,), entry.name, self.folders)
        except NoFile as error:
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
        """The fields that hold the file's images, and for each of its images that is left
        out the reason. Raises Unusable.
        """
        raise NotImplementedError

    def _entries(self, folder: str) -> list[CaptionedFile]:
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
