"""Folders of .txt files to a dataset of documents: paragraphs gathered up to a size.

Paragraphs have blank lines between them. What stands in one file belongs together, so that its
neighbours must not be both learned and held out. Where there are many files for each split, a
file goes to one split as a whole, by a hash of its name. Where there are few, as with some
books, each that is long enough gives every split a stretch of its own, at a place that its
name's hash tells, since books end alike; a document at each border is left out and counted.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.build.files import FileEntry, NoFile, file_entries, read
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    Shares,
    SplitRecord,
    record_id,
)
from data_pipelines.build.text_files import decode
from data_pipelines.features import TEST, TRAIN, VALIDATION
from flamingo_jax.errors import UserError

MANY = 5
"""Files that a split's share must come to for files to be dealt as wholes."""
BORDER = "at the border between the splits of a file"
NULLS = "null characters, as in UTF-16 without its byte order mark"
BLANKS = re.compile("[\n ]*")
MAX_BYTES = 1 << 30
"""Of a file, which is read as a whole."""
TOO_LARGE = f"larger than {MAX_BYTES >> 30} GiB"


@dataclasses.dataclass(frozen=True)
class PlainText:
    """Folders of .txt files."""

    folders: tuple[str, ...]
    shares: Shares = DEFAULT_SHARES
    document_characters: int = 4_000

    @property
    def kind(self) -> str:
        return "text"

    @property
    def about(self) -> str:
        return "Plain text."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[tuple[bool, FileEntry]]:
        """Each file, and whether it goes to one split as a whole."""
        found = file_entries(self.folders, (".txt",), ".txt file")
        for entry in found:
            path = os.path.join(entry.folder, entry.name)
            if not entry.bad and os.path.isfile(path) and os.path.getsize(path) > MAX_BYTES:
                raise UserError(
                    f"{path} is {TOO_LARGE}: cut it in files, as with "
                    "`split --line-bytes=500M --additional-suffix=.txt`"
                )
        least = min((part for part in self._held_out() if part), default=1.0)
        whole = len(found) * least >= MANY
        return [(whole, entry) for entry in found]

    def convert(self, entry: tuple[bool, FileEntry]) -> list[Converted]:
        whole, file = entry
        if file.bad:
            return [DroppedRecord(file.bad)]
        folder, name = pathlib.Path(file.folder), file.name
        try:
            text = decode(read(folder / name, MAX_BYTES, TOO_LARGE))
            text.encode()
        except NoFile as error:
            return [DroppedRecord(str(error))]
        except UnicodeError:
            return [DroppedRecord("not UTF-8")]
        if "\0" in text:
            return [DroppedRecord(NULLS)]
        file_id = record_id(self.folders, folder, name)
        made = list(documents(text, self.document_characters))
        splits = None if whole else stretches(len(made), self.shares, file_id)
        if splits is None:
            splits = [self.shares.split(file_id)] * len(made)
        outcomes: list[Converted] = []
        for number, (document, split) in enumerate(zip(made, splits, strict=True)):
            if split is None:
                outcomes.append(DroppedRecord(BORDER))
            else:
                outcomes.append(SplitRecord(split, {"id": f"{file_id}#{number}", "text": document}))
        return outcomes or [DroppedRecord("empty")]

    def _held_out(self) -> tuple[float, float]:
        return self.shares.validation, self.shares.test


def stretches(count: int, shares: Shares, key: str) -> list[str | None] | None:
    """Chooses the split of each of a file's documents: those of a split follow one another,
    and None stands for a document at a border, which is for none.

    None altogether where they are too few for each split to have its share.
    """
    validation, test = round(shares.validation * count), round(shares.test * count)
    border = validation > 0 and test > 0
    test -= max(0, validation + test + border - count)
    held_out = [*[VALIDATION] * validation, *[None] * border, *[TEST] * test]
    train = count - len(held_out)
    digest = hashlib.blake2b(f"stretches {key}".encode(), digest_size=8).digest()
    before = int.from_bytes(digest) % (max(0, train) + 1)
    splits = [*[TRAIN] * before, *held_out, *[TRAIN] * (train - before)]
    for place in (before - 1, before + len(held_out)):
        if held_out and 0 <= place < count:
            splits[place] = None
    enough = train >= 0 and all(split in splits for split in shares.wanted())
    return splits if enough else None


def documents(text: str, limit: int) -> Iterator[str]:
    """Yields paragraphs joined to documents of at most `limit` characters.

    A longer paragraph is cut at the ends of lines or words, at worst within a word.
    """
    gathered = ""
    for block in re.split(r"\n\s*\n", text):
        for piece in _pieces(block.strip("\n"), limit):
            if gathered and len(gathered) + 2 + len(piece) > limit:
                yield gathered
                gathered = piece
            else:
                gathered = f"{gathered}\n\n{piece}" if gathered else piece
    if gathered:
        yield gathered


def _pieces(block: str, limit: int) -> Iterator[str]:
    start = 0
    while len(block) - start > limit:
        # Never at the start itself: a piece would be empty.
        within = start + 1, start + limit + 1
        cut = (
            max(block.rfind("\n", *within), 0) or max(block.rfind(" ", *within), 0) or start + limit
        )
        yield block[start:cut]
        # Not `lstrip`, which would copy all that is left for each piece.
        start = BLANKS.match(block, cut).end()  # type: ignore[union-attr]
    if block[start:].strip():
        yield block[start:]
