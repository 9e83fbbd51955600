"""WebDataset tar shards, those of img2dataset among them, to a dataset of pairs.

A sample's picture is its .jpg, .png, .webp, ...; its captions are its .txt, or `captions`, `caption` or `text` of its .json.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from data_pipelines.build.captions import NO_CAPTION, NotUtf8, as_utf8, parsed, texts_of
from data_pipelines.build.pictures import ANY_PICTURE, PictureRules, Unfit
from data_pipelines.build.shards import PICTURES, Piece, Sample, files_in, samples
from data_pipelines.build.source import DEFAULT_SHARES, Dropped, Example, Outcome, Shares, record_id
from flamingo_jax.progress import Bar

NO_PICTURE = "no picture"
CAPTION_FIELDS = (("captions", "caption"), ("texts", "text"))
BAD_JSON = "caption file that is not JSON with a caption"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A sample by where its files lie, or what is of no use in a shard: `bad` says why."""

    id: str
    picture: Piece | None = None
    text: Piece | None = None
    about: Piece | None = None
    bad: str = ""

    def __str__(self) -> str:
        return self.id


@dataclasses.dataclass(frozen=True)
class WebDataset:
    inputs: tuple[str, ...]
    shares: Shares = DEFAULT_SHARES
    rules: PictureRules = ANY_PICTURE

    @property
    def kind(self) -> str:
        return "pairs"

    @property
    def about(self) -> str:
        return "Pictures with captions from WebDataset shards."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[Entry]:
        shards = files_in(self.inputs, (".tar",), "tar shard")
        entries = []
        with Bar("headers of shards", len(shards)) as bar:
            for shard in shards:
                for sample in samples(shard.path):
                    name = shard.name.removesuffix(".tar")
                    if isinstance(sample, Sample):
                        name = record_id(self.inputs, shard.root, f"{name}/{sample.key}")
                        entries.append(Entry(name, sample.first(PICTURES), sample.first(("txt",)), sample.first(("json",))))
                    else:
                        entries.append(Entry(name, bad=sample))
                bar.advance(1, f"{len(entries):,} samples")
        return entries

    def convert(self, entry: Entry) -> list[Outcome]:
        if entry.bad or not entry.picture:
            return [Dropped(entry.bad or NO_PICTURE)]
        try:
            captions = _captions(entry)
            if not captions:
                return [Dropped(NO_CAPTION)]
            image = self.rules.store(entry.picture.read())
        except (Unfit, NotUtf8) as error:
            return [Dropped(str(error))]
        except OSError:
            return [Dropped("unreadable")]
        except (KeyError, TypeError, ValueError):
            return [Dropped(BAD_JSON)]
        return [Example(self.shares.split(entry.id), {"id": entry.id, "image": image, "captions": captions})]


def _captions(entry: Entry) -> list[str]:
    """Raises NotUtf8, OSError, and KeyError or TypeError where a .json has no captions."""
    if entry.text and (text := as_utf8(entry.text.read().decode("utf-8", "surrogateescape"))):
        return [text]
    if not entry.about:
        return []
    record = parsed(entry.about.read().decode("utf-8", "surrogateescape"))
    for several, one in CAPTION_FIELDS:
        if several in record or one in record:
            return texts_of(record, several, one)
    raise KeyError(CAPTION_FIELDS)
