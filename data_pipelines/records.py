"""Records of a dataset on disk by position, with their images decoded once where memory
allows.
"""

import hashlib
import logging
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.features import dataset_folder, features, kind_of
from data_pipelines.shard_files import Shard, Shards
from data_pipelines.transforms.examples import strings
from flamingo_jax.errors import UserError
from flamingo_jax.processing import images
from flamingo_jax.storage import read_with_retries

FAILED_SHARE = 0.01
"""Part of the records that may fail to decode."""
SLACK = 4
"""Standard deviations by which those seen so far may have more failures than that: a share is
judged by what is certain of it.
"""
FAILED_AFTER = 100
"""Records to have seen before that part is judged."""

TEXT_BYTES = 64 << 20

IMAGE_FEATURES = {"pages": "images", "pairs": "image", "videos": "frames", "questions": "frames"}
"""The feature of each kind that holds its images."""
UNREADABLE = "unreadable"
"""A field that only records have whose bytes on disk are damaged."""
BLANKS: dict[str, dict[str, Any]] = {
    "pages": {"texts": ["", ""], "images": [b""]},
    "pairs": {"image": b"", "captions": [""]},
    "videos": {"frames": [], "fps": 1.0, "captions": [""]},
    "text": {"text": ""},
    "questions": {"frames": [], "question": "", "answers": [""], "type": ""},
}
"""What stands in for a record that cannot be read: it has texts, and images that cannot be
read.
"""


def open_records(path: str | pathlib.Path, split: str, kind: str | None = None) -> Sequence[Any]:
    """Opens a split of a prepared TFDS dataset, its images left encoded; kind None takes
    whatever it holds.

    Raises:
      UserError: the folder is missing or no dataset, the split is unknown or empty, or features
        of the kind or files are missing.
      StorageError: here, or when a record is asked for: the storage failed each time it was
        asked.
    """
    # Half a second, which commands without data need not wait for.
    import tensorflow_datasets as tfds

    folder = dataset_folder(path)
    builder = read_with_retries(lambda: tfds.builder_from_directory(str(folder)), folder)
    if split not in builder.info.splits:
        raise UserError(
            f"the dataset {folder} has no split {split!r}; it has"
            f" {', '.join(sorted(builder.info.splits))}: name one of these, take the dataset"
            " out of config.held_out, or remove its folder and build it again with a larger"
            " --validation_share or --test_share"
        )
    if not builder.info.splits[split].num_examples:
        raise UserError(
            f"the split {split!r} of the dataset {folder} is empty; build it from more records,"
            " or name another split"
        )
    fields = builder.info.features
    missing = [] if kind is None else sorted(set(features(kind)) - set(fields))
    if missing:
        raise UserError(
            f"the dataset {folder} has no {', '.join(missing)}, so it is not of kind {kind!r}:"
            " mend the dataset's `kind` or `path`"
        )

    kind = kind or kind_of(fields)
    name = f"{folder} {split}"
    own = fields.get_serialized_info()
    decoders = left_encoded(name for name in IMAGE_FEATURES.values() if name in fields)
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        return FaultTolerantSplit(
            builder.as_data_source(split=split, decoders=decoders), kind, name
        )
    raw = Shards(
        [
            Shard(str(part.filename), part.skip, part.take)
            for part in builder.info.splits[split].file_instructions
        ],
        name,
    )
    if own == features(kind).get_serialized_info():
        return FaultTolerantSplit(
            ParsedSplit(raw, {name: bool(info.shape) for name, info in own.items()}), kind, name
        )
    return FaultTolerantSplit(
        DecodedSplit(raw, lambda stored: fields.deserialize_example_np(stored, decoders=decoders)),
        kind,
        name,
    )


def left_encoded(names: Iterable[str]) -> dict[str, Any]:
    """Returns TFDS decoders that leave these features as the bytes they are stored in,
    sequences of images too.
    """
    import tensorflow_datasets as tfds

    class Encoded(tfds.decode.SkipDecoding):
        """SkipDecoding knows single images only."""

        def decode_batch_example_np(self, encoded: Any) -> Any:
            return encoded

    return {name: Encoded() for name in names}


class ParsedSplit(Sequence[Any]):
    """A split of serialised tf.train.Examples, as TFDS decodes them but for images, which
    stay encoded, and for sequences, which are lists.

    TFDS's own decoding knows every feature there is and takes four times as long. plural: {name
    of a field: whether it is a sequence}.
    """

    def __init__(self, raw: Sequence[bytes], plural: Mapping[str, bool]):
        from tensorflow_datasets.proto import tf_example_pb2

        self._raw, self._plural, self._parse = raw, plural, tf_example_pb2.Example.FromString

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, place: Any) -> Any:
        """Raises ValueError where a field is missing, or is several and not a sequence."""
        stored = self._parse(self._raw[place]).features.feature
        record: dict[str, Any] = {}
        for name, plural in self._plural.items():
            form = stored[name].WhichOneof("kind")
            if form is None:
                raise ValueError(f"it has no {name}")
            values = getattr(stored[name], form).value
            if not plural and len(values) != 1:
                raise ValueError(f"it has {len(values)} of {name} in place of one")
            record[name] = list(values) if plural else values[0]
        return record


class DecodedSplit(Sequence[Any]):
    """A split of serialised tf.train.Examples of any features, as TFDS decodes them."""

    def __init__(self, raw: Sequence[bytes], decode: Callable[[bytes], Any]):
        self._raw, self._decode = raw, decode

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, place: Any) -> Any:
        return self._decode(self._raw[place])


class FaultTolerantSplit(Sequence[Any]):
    """A split whose damaged records, which the files' checksums tell, are blank ones; each is
    named once. `name` is the split's in the log.

    What could not be read is not damaged: it is read again, and in the end a StorageError.
    """

    def __init__(self, source: Sequence[Any], kind: str, name: str):
        self._source, self._kind, self._name = source, kind, name
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(f"{self._name} has {len(self)} records")
        try:
            return read_with_retries(lambda: self._source[place], f"record {place} of {self._name}")
        except (UserError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - readers of damaged bytes raise whatever they stumble on.
            if place not in self._damaged:
                self._damaged.add(place)
                logging.warning(
                    "record %d of %s is damaged on disk: %s",
                    place,
                    self._name,
                    str(error)[:200],
                )
            return {"id": f"#{place}", UNREADABLE: True, **BLANKS[self._kind]}


class DamagedError(images.ImageError):
    """A record whose bytes on disk are damaged."""

    def __init__(self) -> None:
        super().__init__("it is damaged on disk")


class CachedText(NamedTuple):
    """What stays of a record in memory when its images do not: a row that shows none of them
    is made of this alone.

    made: see `Record.cached`. damaged: its bytes on disk are.
    """

    id: str
    frame_counts: list[int]
    made: dict[str, Any]
    damaged: bool


class RecordCache:
    """Records by position. What is read stays in memory until `cache_bytes` are used; the rest
    is read again when it is asked for, but for what was
    made of its texts, which has a budget of its own: tokens are small, and making them may take
    as long as decoding the images.

    with_images: False where only their number is asked for. Safe to use from several threads.
    """

    def __init__(
        self,
        source: Sequence[Any],
        kind: str,
        image_size: int,
        image_fit: images.Fit = "pad",
        *,
        cache_bytes: int,
        with_images: bool = True,
    ):
        self._source, self._feature, self._with_images = (
            source,
            IMAGE_FEATURES.get(kind),
            with_images,
        )
        self._size, self._fit = image_size, image_fit
        self._bytes_left, self._text_bytes_left = cache_bytes, TEXT_BYTES
        self._records: dict[int, Record] = {}
        self._cached_texts: dict[int, CachedText] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: int) -> "Record":
        record = self._records.get(place)
        if record is not None:
            return record
        cached_text = self._cached_texts.get(place)
        record = Record(
            self._source,
            place,
            self._feature,
            self._size,
            self._fit,
            with_images=self._with_images,
            cached_text=cached_text,
        )
        if cached_text is None:
            # Two threads may both pass here and overrun the budget by a record.
            if record.cost <= self._bytes_left:
                self._bytes_left -= record.cost
                record.stays = True
                self._records[place] = record
            elif record.text_cost <= self._text_bytes_left:
                self._text_bytes_left -= record.text_cost
                self._cached_texts[place] = record.cached_text
        return record


class Record:
    """One record of `source`: its `cached_text`, its `fields` without images, and its
    images by (visual, frame).

    frame_counts: stored frames of each visual. with_images: False keeps no more of them than that.
    known: from an earlier visit; then the record is not read before its fields or images are
    asked for.
    """

    def __init__(
        self,
        source: Sequence[Any],
        place: int,
        feature: str | None,
        size: int,
        fit: images.Fit = "pad",
        *,
        with_images: bool = True,
        cached_text: CachedText | None = None,
    ):
        self._source, self._place, self._feature, self._keep = source, place, feature, with_images
        self._size, self._fit = size, fit
        self.stays = False
        """It stays in memory, its images as they were decoded."""
        self._fields: dict[str, Any] | None = None
        self._images: list[list[bytes | np.ndarray]] = []
        self._was_whole = cached_text is not None and not cached_text.damaged
        self._loading = threading.Lock()
        if cached_text is None:
            counts = self._load()
            cached_text = CachedText(
                strings([self.fields["id"]])[0], counts, {}, UNREADABLE in self.fields
            )
        self.cached_text = cached_text
        self.id, self.frame_counts, self.made, self.damaged = cached_text

    def _load(self) -> list[int]:
        """Reads it; the stored frames of each visual. Raises DamagedError for one that was
        whole
        when it was read before: what is known of it is not what stands in for it."""
        stored = self._source[self._place]
        if UNREADABLE in stored and self._was_whole:
            raise DamagedError
        encoded = [] if self._feature is None else stored[self._feature]
        if self._feature == "image":
            encoded = [encoded]
        nested = [list(encoded)] if self._feature == "frames" else [[one] for one in encoded]
        self._images = nested if self._keep else []
        self._fields = {name: value for name, value in stored.items() if name != self._feature}
        return [len(frames) for frames in nested]

    def _require(self) -> None:
        """Reads it where that was not done yet: once, also where several threads want an image
        each.
        """
        if self._fields is None:
            with self._loading:
                if self._fields is None:
                    self._load()

    @property
    def fields(self) -> dict[str, Any]:
        self._require()
        assert self._fields is not None
        return self._fields

    @property
    def images(self) -> list[list[bytes | np.ndarray]]:
        """By visual and frame, as they are on disk or as they were decoded; none where they are
        not kept.
        """
        self._require()
        return self._images

    @property
    def text_cost(self) -> int:
        """The most bytes that what is known of it takes, every token made."""
        texts = [
            self.fields.get("text", ""),
            *(
                text
                for name in ("texts", "captions", "answers")
                for text in self.fields.get(name, ())
            ),
        ]
        return 1_000 + 5 * sum(map(len, texts))

    @property
    def cost(self) -> int:
        """The most bytes it takes, each image encoded or decoded, and every token made; to be
        asked for before images are read.
        """
        sizes = [
            max(len(image), 3 * self._size * self._size) + 200
            for frames in self.images
            for image in frames
        ]
        return 1_000 + sum(sizes) + self.text_cost

    def cached(self, text: str, make: Callable[[], Any]) -> Any:
        """What `make` makes of one of the texts, or for "" of all together, kept: each visit
        and each piece of a book asks for it again.
        """
        if text not in self.made:
            self.made[text] = make()
        return self.made[text]

    def digest(self, visual: int, frame: int) -> bytes:
        """Names an image's bytes as they are on disk; to be asked for before it is read."""
        image = self.images[visual][frame]
        assert isinstance(image, bytes), "it has been decoded"
        return hashlib.blake2b(image, digest_size=16).digest()

    def read(self, visual: int, frame: int) -> np.ndarray:
        """uint8 [h, w, 3], its longer side the image size. Raises ImageError."""
        stored = self.images
        if visual >= len(stored):
            raise images.ImageError(f"its texts ask for more images than the {len(stored)} it has")
        image = stored[visual][frame]
        if isinstance(image, bytes):
            image = images.decode(image, self._size, how=self._fit)
            # What is not kept is in its batch from here on, and need not be there twice.
            if self.stays:
                stored[visual][frame] = image
        return image


class Failures:
    """Counts the records whose images cannot be read, names each once, and ends the run when
    they are too many.
    """

    def __init__(self, name: str, records: int):
        self.name, self._records = name, records
        self.seen = 0
        self.failed: set[str] = set()
        self._lock = threading.Lock()

    def saw(self, count: int = 1) -> None:
        """So many records were visited. Raises UserError past the set share of failures."""
        with self._lock:
            self.seen += count
            judged = min(self.seen, self._records)
            expected = FAILED_SHARE * max(judged, FAILED_AFTER)
            if self.seen >= FAILED_AFTER and len(self.failed) > expected + SLACK * math.sqrt(
                expected
            ):
                raise UserError(
                    f"{len(self.failed)} of the first {judged} records of the dataset"
                    f" {self.name} cannot be read, more than {FAILED_SHARE:.0%} (for one"
                    f" {sorted(self.failed)[0]!r}); build the dataset again from whole images"
                )

    def add(self, record_id: str, error: Exception) -> None:
        """This record's images cannot be read."""
        with self._lock:
            new = record_id not in self.failed
            self.failed.add(record_id)
        if new:
            logging.warning("record %r of %s is masked: %s", record_id, self.name, error)
