"""Source `plain_text`: converts folders of .txt files to text documents, paragraphs joined up
to a size.

Paragraphs are separated by blank lines. Text of one file belongs together, and held-out text
should not be adjacent to training text. With many files per split, each file is put into one
split by a hash of its name. With few, such as some books, each file that is long enough gives
every split a contiguous part, at a position by a hash of its name (not always the end: books
end alike); a document at each border between splits is dropped and counted. The shorter ones are
ranked by that hash, and the first of them are held out, so that each split gets a file.
"""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.build.files import FileEntry, FileRefused, file_entries, read
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
    SplitRecord,
    record_id,
)
from data_pipelines.build.text_files import decode
from data_pipelines.features import TEST, TRAIN, VALIDATION
from flamingo_jax.errors import UserError

MANY = 5
"""Whole files are put into splits if each split gets at least this many on average."""
BORDER = "at the border between the splits of a file"
NULLS = "null characters, as in UTF-16 without its byte order mark"
BLANKS = re.compile("[\n ]*")
MAX_BYTES = 1 << 30
"""The most bytes of a file, which is read into memory."""
TOO_LARGE = f"larger than {MAX_BYTES >> 30} GiB"


@dataclasses.dataclass(frozen=True)
class PlainText:
    """Reads .txt files, several records per file.

    document_characters: the most characters of a document.
    """

    folders: tuple[str, ...]
    shares: SplitFractions = DEFAULT_SHARES
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

    def entries(self) -> Sequence[tuple[bool, str, FileEntry]]:
        """Lists the files as (whether the whole file goes into one split, that split or the one
        of a file that is too short to be divided, file).
        """
        found = file_entries(self.folders, (".txt",), ".txt file")
        for entry in found:
            path = os.path.join(entry.folder, entry.name)
            if not entry.bad and os.path.isfile(path) and os.path.getsize(path) > MAX_BYTES:
                raise UserError(
                    f"{path} is {TOO_LARGE}: cut it in files, as with "
                    "`split --line-bytes=500M --additional-suffix=.txt`"
                )
        least = min((part for part in self._held_out() if part), default=1.0)
        ids = [record_id(self.folders, pathlib.Path(file.folder), file.name) for file in found]
        whole = len(found) * least >= MANY
        if whole:
            splits = {file_id: self.shares.split(file_id) for file_id in ids}
        else:
            readable = [file_id for file_id, file in zip(ids, found, strict=True) if not file.bad]
            splits = splits_by_rank(readable, self.shares)
        return [
            (whole, splits.get(file_id, TRAIN), file)
            for file_id, file in zip(ids, found, strict=True)
        ]

    def convert(self, entry: tuple[bool, str, FileEntry]) -> list[Converted]:
        """Splits one file into documents, each with its split."""
        whole, split_of_file, file = entry
        if file.bad:
            return [DroppedRecord(file.bad)]
        folder, name = pathlib.Path(file.folder), file.name
        try:
            text = decode(read(folder / name, MAX_BYTES, TOO_LARGE))
            text.encode()
        except FileRefused as error:
            return [DroppedRecord(str(error))]
        except UnicodeError:
            return [DroppedRecord("not UTF-8")]
        if "\0" in text:
            return [DroppedRecord(NULLS)]
        file_id = record_id(self.folders, folder, name)
        made = list(documents(text, self.document_characters))
        splits = None if whole else stretches(len(made), self.shares, file_id)
        if splits is None:
            splits = [split_of_file] * len(made)
        outcomes: list[Converted] = []
        for number, (document, split) in enumerate(zip(made, splits, strict=True)):
            if split is None:
                outcomes.append(DroppedRecord(BORDER))
            else:
                outcomes.append(SplitRecord(split, {"id": f"{file_id}#{number}", "text": document}))
        return outcomes or [DroppedRecord("empty")]

    def _held_out(self) -> tuple[float, float]:
        return self.shares.validation, self.shares.test


def splits_by_rank(ids: Sequence[str], shares: SplitFractions) -> dict[str, str]:
    """Chooses the splits of a few files, ranked by a hash of their ids: {id: split}.

    Each wanted split gets its share, rounded, but at least one file if there are as many files
    as splits; with fewer, training and validation come first.
    """
    ranked = sorted(ids, key=lambda name: hashlib.blake2b(f"rank {name}".encode()).digest())
    parts = {VALIDATION: shares.validation, TEST: shares.test}
    first, *others = shares.wanted()
    further = [split for split in others for _ in range(1, round(parts[split] * len(ranked)))]
    # At least one is left for the first split.
    held_out = [*others, *further][: max(0, len(ranked) - 1)]
    return dict.fromkeys(ranked, first) | dict(zip(ranked, held_out, strict=False))


def stretches(count: int, shares: SplitFractions, key: str) -> list[str | None] | None:
    """Chooses the splits of a file's `count` documents: contiguous parts, with None for a
    document at a border, which is dropped.

    key: determines the position of the held-out parts.
    Returns: None if there are too few documents for all splits.
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
    """Joins paragraphs to documents of at most `limit` characters.

    A longer paragraph is split at the end of a line or a word, or else within a word.
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
    """Splits a paragraph into pieces of at most `limit` characters."""
    start = 0
    while len(block) - start > limit:
        # Search after the start: a cut at the start itself would make an empty piece.
        within = start + 1, start + limit + 1
        cut = (
            max(block.rfind("\n", *within), 0) or max(block.rfind(" ", *within), 0) or start + limit
        )
        yield block[start:cut]
        # A regex, not `lstrip`, which would copy the remaining text for each piece.
        start = BLANKS.match(block, cut).end()  # type: ignore[union-attr]
    if block[start:].strip():
        yield block[start:]
