"""Folders of .txt files to a dataset of documents: paragraphs (blank lines between them) gathered up to a size."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.build.files import FileEntry, file_entries
from data_pipelines.build.source import DEFAULT_SHARES, Dropped, Example, Outcome, Shares, record_id


@dataclasses.dataclass(frozen=True)
class PlainText:
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

    def entries(self) -> Sequence[FileEntry]:
        return file_entries(self.folders, (".txt",), ".txt file")

    def convert(self, entry: FileEntry) -> list[Outcome]:
        if entry.bad:
            return [Dropped(entry.bad)]
        folder, name = pathlib.Path(entry.folder), entry.name
        try:
            text = (folder / name).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            return [Dropped("not UTF-8" if isinstance(error, UnicodeDecodeError) else "unreadable")]
        file_id = record_id(self.folders, folder, name)
        outcomes: list[Outcome] = []
        for number, document in enumerate(documents(text, self.document_characters)):
            document_id = f"{file_id}#{number}"
            outcomes.append(Example(self.shares.split(document_id), {"id": document_id, "text": document}))
        return outcomes or [Dropped("empty")]


def documents(text: str, limit: int) -> Iterator[str]:
    """Paragraphs joined to documents of at most `limit` characters.

    A longer paragraph is cut at the ends of lines or words, at worst within a word.
    """
    gathered = ""
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        for piece in _pieces(block.strip("\n"), limit):
            if gathered and len(gathered) + 2 + len(piece) > limit:
                yield gathered
                gathered = piece
            else:
                gathered = f"{gathered}\n\n{piece}" if gathered else piece
    if gathered:
        yield gathered


def _pieces(block: str, limit: int) -> Iterator[str]:
    while len(block) > limit:
        cut = max(block.rfind("\n", 1, limit + 1), 0) or max(block.rfind(" ", 1, limit + 1), 0) or limit
        yield block[:cut]
        block = block[cut:].lstrip("\n ")
    if block.strip():
        yield block
