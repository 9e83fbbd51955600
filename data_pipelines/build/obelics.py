"""Source `obelics`: converts OBELICS parquet files to interleaved pages.

A row has lists `images` and `texts` of equal length; at each index one of them has an item and
the other null. The published files have URLs in `images`: the images are looked up among
downloaded ones (`input_files.by_address`: output of img2dataset, or files named by the SHA-256
of their URL). Files with the images themselves, as bytes or {"bytes": ...} as Hugging Face's
datasets write them, need nothing else. Missing images are left out and counted.

Where a page changes its topic, the authors inserted END_OF_DOCUMENT into a text. It is
removed, and what follows becomes a document of its own, in the same split.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from data_pipelines.build.files import existing_folder
from data_pipelines.build.images import ImageRules
from data_pipelines.build.input_files import (
    ByteRange,
    InputFile,
    address_key,
    by_address,
    files_in,
    folders_of,
    reader,
)
from data_pipelines.build.interleaved import PAGES_RULES, ImageRef, make_page
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
    Stream,
    record_id,
)
from data_pipelines.build.text_files import NOT_UTF8
from flamingo_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("images", "texts")
ROWS = 16
"""Rows per read: with images inside, a row may take many megabytes."""
BAD_FILE = "unreadable parquet file"
BAD_ROWS = "row of a damaged part of a parquet file"
BAD_ROW = "row without lists of images and texts"
PARAGRAPH = "\n"
END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
Item = str | bytes | ByteRange | None


@dataclasses.dataclass(frozen=True)
class ObelicsRow:
    """A row of a parquet file.

    items: in document order: texts, images (bytes or byte ranges), and None for missing
      images.
    bad: the reason why the entry gives no record, "" if it does.
    """

    id: str
    items: tuple[Item, ...] = ()
    bad: str = ""

    def __str__(self) -> str:
        return self.id


@dataclasses.dataclass(frozen=True)
class Obelics:
    """Reads documents of OBELICS.

    inputs: the parquet files.
    images: folders of downloaded images; by default those of the parquet files.
    """

    inputs: tuple[str, ...]
    images: tuple[str, ...] = ()
    shares: SplitFractions = DEFAULT_SHARES
    rules: ImageRules = PAGES_RULES

    @property
    def kind(self) -> str:
        return "pages"

    @property
    def about(self) -> str:
        return "Documents of OBELICS with their images."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Stream[ObelicsRow]:
        """Lists the rows of all files, read lazily."""
        _parquet()
        for folder in self.images:
            existing_folder(folder, "--images")
        files = files_in(self.inputs, (".parquet",), "parquet file")
        counts = [_rows(file) for file in files]
        downloaded = by_address(self.images or folders_of(self.inputs))

        def rows() -> Iterator[ObelicsRow]:
            for file, count in zip(files, counts, strict=True):
                yield from self._read(file, count, downloaded)

        return Stream(sum(max(1, count) for count in counts), rows)

    def convert(self, entry: ObelicsRow) -> list[Converted]:
        """Makes the documents of one row pages."""
        if entry.bad:
            return [DroppedRecord(entry.bad)]
        split = self.shares.split(entry.id)
        outcomes = []
        for number, items in enumerate(_documents(entry.items)):
            name = f"{entry.id}/{number}" if number else entry.id
            shown = [i + PARAGRAPH if isinstance(i, str) else ImageRef(_reader(i)) for i in items]
            outcomes.append(make_page(name, split, shown, self.rules))
        return outcomes

    def _read(
        self, file: InputFile, count: int, downloaded: dict[bytes, ByteRange]
    ) -> Iterator[ObelicsRow]:
        """Yields the rows of a file, with a bad entry for each row that cannot be read."""
        name = record_id(self.inputs, file.root, file.name)
        done = 0
        try:
            parquet = _parquet().ParquetFile(file.path, page_checksum_verification=True)
            if not set(COLUMNS) <= set(parquet.schema_arrow.names):
                yield ObelicsRow(name, bad=f"parquet file without columns {' and '.join(COLUMNS)}")
                return
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                first = done
                try:
                    for batch in parquet.iter_batches(
                        ROWS, row_groups=[group], columns=list(COLUMNS)
                    ):
                        for row in range(len(batch)):
                            yield _entry(f"{name}#{done}", batch, row, downloaded)
                            done += 1
                except _errors():
                    pass
                for _ in range(size - (done - first)):
                    yield ObelicsRow(name, bad=BAD_ROWS)
                done = first + size
        except _errors():
            yield ObelicsRow(name, bad=BAD_FILE)


def _entry(
    name: str, batch: "pyarrow.RecordBatch", row: int, downloaded: dict[bytes, ByteRange]
) -> ObelicsRow:
    """Reads a row's texts and images, in document order."""
    try:
        images, texts = (batch.column(column)[row].as_py() for column in COLUMNS)
    except UnicodeDecodeError:
        return ObelicsRow(name, bad=NOT_UTF8)
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        return ObelicsRow(name, bad=BAD_ROW)
    items: list[Item] = []
    for image, text in zip(images, texts, strict=True):
        if isinstance(text, str):
            items.append(text)
        elif text is not None:
            return ObelicsRow(name, bad=BAD_ROW)
        if image is not None:
            within = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
            items.append(
                downloaded.get(address_key(within))
                if isinstance(within, str)
                else within
                if isinstance(within, bytes)
                else None
            )
    return ObelicsRow(name, tuple(items))


def _documents(items: Iterable[Item]) -> list[list[Item]]:
    """Splits a row's items at END_OF_DOCUMENT, and leaves out empty documents."""
    documents: list[list[Item]] = [[]]
    for item in items:
        if not isinstance(item, str):
            documents[-1].append(item)
            continue
        first, *others = item.split(END_OF_DOCUMENT)
        documents[-1].append(first)
        documents += [[other] for other in others]
    found = [some for some in documents if any(not isinstance(i, str) or i.strip() for i in some)]
    return found or documents[:1]


def _rows(file: InputFile) -> int:
    """Returns the number of rows of a file; 0 if it cannot be read."""
    try:
        return _parquet().ParquetFile(file.path).metadata.num_rows
    except _errors():
        return 0


def _errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that pyarrow raises on damaged files."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "reading parquet files needs pyarrow, which is not installed: `pip install pyarrow`"
            " or `pip install -e '.[parquet]'`"
        ) from error
    return pyarrow.parquet


def _reader(item: bytes | ByteRange | None) -> Any:
    return (lambda: item) if isinstance(item, bytes) else reader((), None, item)
