"""Source `webdataset`: converts WebDataset tar shards, such as img2dataset's, to image-text
pairs.

A sample's image is its .jpg, .png, .webp, ...; its captions are its .txt, or `captions`,
`caption`, `texts` or `text` of its .json. `tar_samples` groups the members of a shard into
samples.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipelines.build.byte_ranges import ByteRange, why
from data_pipelines.build.captions import NO_CAPTION, Texts, read_texts
from data_pipelines.build.images import ANY_IMAGE, ImageRules, UnusableImage
from data_pipelines.build.input_files import files_in
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
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
    """A sample's files as byte ranges of its shard.

    id: of the record.
    group: equal for samples with the same key, which go to the same split.
    image, text, about: its image, its .txt and its .json.
    bad: the reason why the entry gives no record, "" if it does.
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
    """Reads image-text pairs from tar shards, one record per sample, without unpacking to
    disk.
    """

    inputs: tuple[str, ...]
    shares: SplitFractions = DEFAULT_SHARES
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
        """Lists the samples of all shards by reading their headers."""
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
        """Reads one sample as a record, or gives the reason why it was dropped."""
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
        except (UnusableImage, NotUtf8) as error:
            return [DroppedRecord(str(error), others)]
        except OSError as error:
            return [DroppedRecord(why(error), others)]
        except (KeyError, TypeError, ValueError):
            return [DroppedRecord(BAD_JSON, others)]
        fields = {"id": entry.id, "image": image, "captions": list(captions)}
        return [SplitRecord(self.shares.split(entry.group), fields, others, lost)]


class _Read:
    """The bytes of a sample's files, read in order of offset, since a compressed shard can
    only be decompressed forward.
    """

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
    """Reads a sample's captions, from its .txt or else its .json.

    Raises: NotUtf8, OSError; KeyError or TypeError where the .json has no captions.
    """
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
