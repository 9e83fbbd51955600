"""WebDataset tar shards, those of img2dataset among them, to a dataset of pairs.

A sample's image is its .jpg, .png, .webp, ...; its captions are its .txt, or `captions`,
`caption` or `text` of its .json. Which members make a sample is told in `tar_samples`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.build.byte_ranges import ByteRange, why
from data_pipelines.build.captions import NO_CAPTION, Texts, read_texts
from data_pipelines.build.images import ANY_IMAGE, ImageRules, Unfit
from data_pipelines.build.input_files import files_in
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    Shares,
    SplitRecord,
    record_id,
)
from data_pipelines.build.tar_samples import TarSample, samples
from data_pipelines.build.tars import SUFFIXES
from data_pipelines.build.text_files import NotUtf8, as_utf8, decode, parsed
from flamingo_jax.progress import Bar

NO_IMAGE = "no image"
OTHER_IMAGE = "another image of the same sample"
CAPTION_FIELDS = (("captions", "caption"), ("texts", "text"))
BAD_JSON = "caption file that is not JSON with a caption"


@dataclasses.dataclass(frozen=True)
class PairSample:
    """A sample by where its files lie, or what is of no use in a shard: `bad` says why.

    group: what samples of one key have in common, so that they land in one split.
    """

    id: str
    group: str = ""
    image: ByteRange | None = None
    text: ByteRange | None = None
    about: ByteRange | None = None
    other_images: int = 0
    bad: str = ""

    def __str__(self) -> str:
        return self.id


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """Image-text pairs of tar shards."""

    inputs: tuple[str, ...]
    shares: Shares = DEFAULT_SHARES
    rules: ImageRules = ANY_IMAGE

    @property
    def kind(self) -> str:
        return "pairs"

    @property
    def about(self) -> str:
        return "Images with captions from WebDataset shards."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[PairSample]:
        shards = files_in(self.inputs, SUFFIXES, "tar shard")
        entries = []
        with Bar("headers of shards", len(shards)) as bar:
            for shard in shards:
                for sample in samples(shard.path):
                    name = shard.name.removesuffix(".tar")
                    if isinstance(sample, TarSample):
                        entries.append(
                            PairSample(
                                record_id(self.inputs, shard.root, f"{name}/{sample.key}"),
                                record_id(self.inputs, shard.root, f"{name}/{sample.group}"),
                                sample.image,
                                sample.text,
                                sample.about,
                                sample.other_images,
                            )
                        )
                    else:
                        entries.append(PairSample(name, bad=sample))
                bar.advance(1, f"{len(entries):,} samples")
        return entries

    def convert(self, entry: PairSample) -> list[Converted]:
        others = (OTHER_IMAGE,) * entry.other_images
        if entry.bad or not entry.image:
            return [DroppedRecord(entry.bad or NO_IMAGE, others)]
        files = _Read(
            byte_range for byte_range in (entry.image, entry.text, entry.about) if byte_range
        )
        try:
            captions, lost = _captions(entry, files)
            if not captions:
                return [DroppedRecord(NO_CAPTION, others, lost)]
            image = self.rules.store(files[entry.image])
        except (Unfit, NotUtf8) as error:
            return [DroppedRecord(str(error), others)]
        except OSError as error:
            return [DroppedRecord(why(error), others)]
        except (KeyError, TypeError, ValueError):
            return [DroppedRecord(BAD_JSON, others)]
        fields = {"id": entry.id, "image": image, "captions": list(captions)}
        return [SplitRecord(self.shares.split(entry.group), fields, others, lost)]


class _Read:
    """The bytes of a sample's files, read in the order in which they lie: compressed shards are
    unpacked on the way."""

    def __init__(self, byte_ranges: Iterable[ByteRange]):
        self._data: dict[ByteRange, bytes | OSError] = {}
        for byte_range in sorted(byte_ranges):
            try:
                self._data[byte_range] = byte_range.read()
            except OSError as error:
                self._data[byte_range] = error

    def __getitem__(self, byte_range: ByteRange) -> bytes:
        """Raises OSError."""
        data = self._data[byte_range]
        if isinstance(data, OSError):
            raise data
        return data


def _captions(entry: PairSample, files: _Read) -> Texts:
    """Raises NotUtf8, OSError, and KeyError or TypeError where a .json has no captions."""
    if entry.text and (text := as_utf8(decode(files[entry.text]))):
        return Texts((text,))
    if not entry.about:
        return Texts()
    record = parsed(decode(files[entry.about]))
    found = [
        read_texts(record, several, one)
        for several, one in CAPTION_FIELDS
        if several in record or one in record
    ]
    if not found:
        raise KeyError(CAPTION_FIELDS)
    return next((texts for texts in found if texts.kept), found[0])
