"""Source `mmc4`: converts MMC4 (Multimodal C4) to interleaved pages.

Its JSON lines have one document each: `text_list` (sentences) and `image_info`, whose items
have `image_name`, `raw_url`, `matched_text_index` (the index of the sentence that the image
belongs to) and `matched_sim` (their CLIP similarity); `similarity_matrix` is [images,
sentences].

Each image is put directly before its sentence. Images without `matched_text_index` are
assigned to sentences one to one, maximising the sum of similarities, as MMC4's authors did.

OpenFlamingo's conversion is read too: tar shards with a .json for each document, whose images
are inside it as `image_base64` (also written as Python's b'...'). Numbers may have passed
through a table: 1.0 is accepted as an index, NaN means none.
"""

import base64
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.build.byte_ranges import ByteRange, why
from data_pipelines.build.captions import is_missing, why_no_text
from data_pipelines.build.files import existing_folder
from data_pipelines.build.images import ImageRules, UnusableImage
from data_pipelines.build.input_files import (
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
from data_pipelines.build.tar_samples import samples
from data_pipelines.build.tars import SUFFIXES
from data_pipelines.build.text_files import (
    NOT_UTF8,
    TOO_LONG,
    TooLongLine,
    decode,
    parsed,
    text_lines,
    unreadable,
)
from flamingo_jax.errors import UserError

BAD_LINE = "line that is not JSON with sentences and images"
NO_DOCUMENT = "sample without a .json"
SHARD_DOCUMENT = 300_000
"""Approximate bytes of a document with its images, for the progress bar."""
UNMATCHED = "matched to no sentence"


@dataclasses.dataclass(frozen=True)
class Mmc4Document:
    """A document, from a line of a file or a member of a shard.

    text: its JSON, or the byte range of it.
    bad: the reason why the entry gives no record, "" if it does.
    downloaded: for each image its file, if it was found by URL.
    """

    id: str
    text: str | ByteRange = ""
    bad: str = ""
    downloaded: tuple[ByteRange | None, ...] = ()

    def __str__(self) -> str:
        return self.id


class Match(NamedTuple):
    """The sentence that an image belongs to, and their similarity."""

    sentence: int
    similarity: float


@dataclasses.dataclass(frozen=True)
class Mmc4:
    """Reads documents of MMC4.

    inputs: the files of JSON lines, or shards.
    images: folders of images, by name or by URL (`input_files.by_address`); by default those
      of the inputs.
    min_similarity: drop images with a lower CLIP similarity to their sentence, a cosine from
      -1 to 1. MMC4 has none below 0.15; OpenFlamingo was trained with 0.24.
    """

    inputs: tuple[str, ...]
    images: tuple[str, ...] = ()
    shares: SplitFractions = DEFAULT_SHARES
    rules: ImageRules = PAGES_RULES
    min_similarity: float = 0.0

    @property
    def kind(self) -> str:
        return "pages"

    @property
    def about(self) -> str:
        return "Documents of MMC4 with their images."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Stream[Mmc4Document]:
        """Lists the documents of all files and shards, read lazily."""
        if not -1 <= self.min_similarity <= 1:
            raise UserError(
                f"--min_similarity={self.min_similarity:g} is no cosine: similarities of MMC4"
                " lie between -1 and 1, most between 0.15 and 0.35"
            )
        for folder in self.images:
            existing_folder(folder, "--images")
        files = _files(self.inputs)
        beside = () if all(map(_is_shard, files)) else folders_of(self.inputs)
        downloaded = by_address(self.images or beside)

        def documents() -> Iterator[Mmc4Document]:
            for file in files:
                for entry in self._shard(file) if _is_shard(file) else self._lines(file):
                    known = _downloaded(entry, downloaded) if downloaded else ()
                    yield dataclasses.replace(entry, downloaded=known)

        return Stream(sum(map(_about_how_many, files)), documents)

    def convert(self, entry: Mmc4Document) -> list[Converted]:
        """Makes one document a page, with each image before its sentence."""
        if entry.bad:
            return [DroppedRecord(entry.bad)]
        try:
            text = _text(entry)
        except OSError as error:
            return [DroppedRecord(why(error))]
        if not text.strip():
            return []
        record = parsed(text)
        try:
            texts, images = record["text_list"], record["image_info"]
        except (KeyError, TypeError):
            return [DroppedRecord(BAD_LINE)]
        if not isinstance(texts, list) or not isinstance(images, list):
            return [DroppedRecord(BAD_LINE)]
        reasons = [None if text == "" else why_no_text(text) for text in texts]
        texts_lost = tuple(reason for reason in reasons if reason)
        if texts_lost and len(texts_lost) == len(texts):
            return [DroppedRecord(NOT_UTF8 if NOT_UTF8 in texts_lost else BAD_LINE)]
        # Replace unusable sentences by empty ones: images refer to sentences by index.
        sentences = ["" if reason else text for text, reason in zip(texts, reasons, strict=True)]
        folders = self.images or folders_of(self.inputs)
        matches = match(images, len(sentences), record.get("similarity_matrix"))
        before: list[list[ImageRef]] = [[] for _ in sentences]  # The images of each sentence.
        lost = []
        for place, (image, matched) in enumerate(zip(images, matches, strict=True)):
            if matched is None:
                lost.append(UNMATCHED)
            elif not matched.similarity >= self.min_similarity:
                lost.append(f"similarity under {self.min_similarity:g}")
            else:
                byte_range = entry.downloaded[place] if place < len(entry.downloaded) else None
                before[matched.sentence].append(ImageRef(_reader(image, folders, byte_range)))
        items: list[str | ImageRef] = []
        for shown, sentence in zip(before, sentences, strict=True):
            items += [*shown, f"{sentence} "]
        outcome = make_page(entry.id, self.shares.split(entry.id), items, self.rules)
        parts_lost = (*lost, *outcome.parts_dropped)
        return [dataclasses.replace(outcome, parts_dropped=parts_lost, texts_dropped=texts_lost)]

    def _lines(self, file: InputFile) -> Iterator[Mmc4Document]:
        """Yields the documents of a file of JSON lines."""
        name = record_id(self.inputs, file.root, file.name)
        try:
            for number, line in enumerate(text_lines(file.path)):
                if isinstance(line, TooLongLine):
                    yield Mmc4Document(f"{name}#{number}", bad=TOO_LONG)
                else:
                    yield Mmc4Document(f"{name}#{number}", line)
        except OSError as error:
            raise unreadable(file.path, error) from error

    def _shard(self, file: InputFile) -> Iterator[Mmc4Document]:
        """Yields the documents of a tar shard."""
        name = record_id(self.inputs, file.root, file.name)
        for sample in samples(file.path):
            if isinstance(sample, str):
                yield Mmc4Document(name, bad=sample)
            elif sample.about is None:
                yield Mmc4Document(f"{name}/{sample.key}", bad=NO_DOCUMENT)
            else:
                yield Mmc4Document(f"{name}/{sample.key}", sample.about)


def _files(inputs: Sequence[str]) -> list[InputFile]:
    """Lists inputs that are files, and .jsonl files, or else tar shards, below folders."""
    try:
        return files_in(inputs, (".jsonl",), "file of MMC4")
    except UserError:
        return files_in(inputs, (".jsonl", *SUFFIXES), "file of MMC4")


def _is_shard(file: InputFile) -> bool:
    return file.name.lower().endswith(SUFFIXES)


def _text(entry: Mmc4Document) -> str:
    """Raises OSError."""
    return entry.text if isinstance(entry.text, str) else decode(entry.text.read())


def _reader(
    image: dict[str, Any], folders: Sequence[str], byte_range: ByteRange | None
) -> Callable[[], bytes]:
    """Returns a function that reads an image, from the document or as `input_files.reader`."""
    within = image.get("image_base64")
    if not isinstance(within, str) or not within:
        return reader(folders, image.get("image_name"), byte_range)

    def read() -> bytes:
        written = re.fullmatch(r"b'(.*)'", within, re.DOTALL)
        try:
            return base64.b64decode(written[1] if written else within.rpartition(",")[2])
        except ValueError as error:
            raise UnusableImage("unreadable") from error

    return read


def match(images: list[Any], sentences: int, matrix: Any) -> list[Match | None]:
    """Finds the sentence of each image in `image_info`; None where there is none.

    A similarity that is not given counts as infinite, so that the image is used.
    """
    similar = _similarities(matrix, (len(images), sentences))
    found = [_given(image, place, sentences, similar) for place, image in enumerate(images)]
    free = [
        place
        for place, image in enumerate(images)
        if isinstance(image, dict) and is_missing(image.get("matched_text_index"))
    ]
    if free and similar is not None:
        # Imported here because scipy would add half to the start-up time of every command.
        from scipy.optimize import linear_sum_assignment

        for row, sentence in zip(*linear_sum_assignment(similar[free], maximize=True), strict=True):
            found[free[row]] = Match(int(sentence), float(similar[free[row], sentence]))
    return found


def _given(image: Any, place: int, sentences: int, similar: np.ndarray | None) -> Match | None:
    """Reads an image's own match from the document; None where it has no valid index."""
    index = image.get("matched_text_index") if isinstance(image, dict) else None
    if isinstance(index, bool) or not isinstance(index, int | float):
        return None
    if not 0 <= index < sentences or index != int(index):
        return None
    sentence, similarity = int(index), image.get("matched_sim")
    if type(similarity) not in (int, float) or is_missing(similarity):
        similarity = math.inf if similar is None else similar[place, sentence]
    return Match(sentence, float(similarity))


def _similarities(matrix: Any, shape: tuple[int, int]) -> np.ndarray | None:
    """Converts the matrix to float [images, sentences]; None if it is missing or invalid."""
    try:
        values = np.asarray(matrix, float)
    except (TypeError, ValueError):
        return None
    return values if values.shape == shape and np.isfinite(values).all() else None


def _downloaded(entry: Mmc4Document, known: dict[bytes, ByteRange]) -> tuple[ByteRange | None, ...]:
    """Looks up a document's images by URL; None for those that were not downloaded."""
    try:
        record = parsed(_text(entry))
    except OSError:  # It is counted when the entry is converted.
        return ()
    images = record.get("image_info") if isinstance(record, dict) else None
    addresses = (
        [image.get("raw_url") if isinstance(image, dict) else None for image in images]
        if isinstance(images, list)
        else []
    )
    return tuple(
        known.get(address_key(address)) if isinstance(address, str) else None
        for address in addresses
    )


def _about_how_many(file: InputFile) -> int:
    """Estimates a file's number of documents, for the progress bar."""
    if _is_shard(file):
        return 1 + file.path.stat().st_size // SHARD_DOCUMENT
    with file.path.open("rb") as opened:
        return sum(part.count(b"\n") for part in iter(lambda: opened.read(1 << 20), b""))
