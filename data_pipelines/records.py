"""Random access to a dataset's records: opening a split, damage on disk, and a cache of
decoded images within a memory budget.
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
"""Fraction of the records that may fail to decode before the run ends."""
SLACK = 4
"""Standard deviations by which the failures so far may exceed that fraction, so that a run
does not end because of an unlucky sample.
"""
FAILED_AFTER = 100
"""Records to read before the fraction is checked."""

TEXT_BYTES = 64 << 20
"""Memory budget for the texts and tokens of records whose images are not cached."""

IMAGE_FEATURES = {"pages": "images", "pairs": "image", "videos": "frames", "questions": "frames"}
"""Kind -> the feature that holds its images."""
UNREADABLE = "unreadable"
"""A field that marks a record whose bytes on disk are damaged."""
BLANKS: dict[str, dict[str, Any]] = {
    "pages": {"texts": ["", ""], "images": [b""]},
    "pairs": {"image": b"", "captions": [""]},
    "videos": {"frames": [], "fps": 1.0, "captions": [""]},
    "text": {"text": ""},
    "questions": {"frames": [], "question": "", "answers": [""], "type": ""},
}
"""Kind -> the fields that replace a damaged record's: empty texts, and images that fail to
decode.
"""


def open_records(path: str | pathlib.Path, split: str, kind: str | None = None) -> Sequence[Any]:
    """Opens a split of a prepared TFDS dataset for random access; its images stay encoded.

    kind: the kind that the dataset must have; None for any.

    Raises:
      UserError: the folder is missing or is not a dataset, the split is unknown or empty, or
        features of the kind or files are missing.
      StorageError: the storage kept failing, here or when a record is read.
    """
    # Imported here because it takes half a second, which commands without data save.
    import tensorflow_datasets as tfds

    folder = dataset_folder(path)
    builder = read_with_retries(lambda: tfds.builder_from_directory(str(folder)), folder)
    if split not in builder.info.splits:
        raise UserError(
            f"the dataset {folder} has no split {split!r}; it has"
            f" {', '.join(sorted(builder.info.splits))}: name one of these (a run that is to"
            " measure no held-out loss leaves the dataset out of config.held_out), or remove its"
            " folder and build it again with a larger --validation_share or --test_share"
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
    """Returns TFDS decoders that leave these features encoded, sequences of images too."""
    import tensorflow_datasets as tfds

    class Encoded(tfds.decode.SkipDecoding):
        """SkipDecoding for sequences of images too; the base class skips single images only."""

        def decode_batch_example_np(self, encoded: Any) -> Any:
            return encoded

    return {name: Encoded() for name in names}


class ParsedSplit(Sequence[Any]):
    """Parses serialised tf.train.Examples of this library's own kinds: images stay encoded,
    sequences become lists.

    A quarter of the time that TFDS's general decoder takes.

    plural: {field: whether it is a sequence}.
    """

    def __init__(self, raw: Sequence[bytes], plural: Mapping[str, bool]):
        from tensorflow_datasets.proto import tf_example_pb2

        self._raw, self._plural, self._parse = raw, plural, tf_example_pb2.Example.FromString

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, place: Any) -> Any:
        """Parses one record; raises ValueError for a missing field, or several values where
        one is expected.
        """
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
    """Decodes serialised tf.train.Examples of any features with TFDS's decoder."""

    def __init__(self, raw: Sequence[bytes], decode: Callable[[bytes], Any]):
        self._raw, self._decode = raw, decode

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, place: Any) -> Any:
        return self._decode(self._raw[place])


class FaultTolerantSplit(Sequence[Any]):
    """Replaces damaged records (wrong checksum, or not parseable) by blank ones, and logs each
    once.

    A storage error is not damage: the record is read again, finally a StorageError is raised.

    name: the split's, for the log.
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
    """Raised for a record whose bytes on disk are damaged."""

    def __init__(self) -> None:
        super().__init__("it is damaged on disk")


class CachedText(NamedTuple):
    """The part of a record that is cached without its images: enough for a row that shows
    none.

    frame_counts: stored frames of each visual.
    made: token sequences by text, see `Record.cached`.
    damaged: its bytes on disk are damaged.
    """

    id: str
    frame_counts: list[int]
    made: dict[str, Any]
    damaged: bool


class RecordCache:
    """Random access to a split's records with a cache.

    Records are cached, images decoded, until `cache_bytes` are used; later ones are read again
    on each access. Tokens have a budget of their own (`TEXT_BYTES`): they are small, and
    tokenising may take as long as decoding the images. Nothing is evicted: over an epoch each
    record is used once, so a least-recently-used cache would rarely hit. Thread-safe.

    with_images: False where only the number of images is needed.
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
            # Without a lock: two threads may both pass and overrun the budget by one record.
            if record.cost <= self._bytes_left:
                self._bytes_left -= record.cost
                record.stays = True
                self._records[place] = record
            elif record.text_cost <= self._text_bytes_left:
                self._text_bytes_left -= record.text_cost
                self._cached_texts[place] = record.cached_text
        return record


class Record:
    """One record of `source`: its fields without images, and its images by (visual, frame).

    frame_counts: stored frames of each visual.
    with_images: False keeps the frame counts alone.
    cached_text: from an earlier access; with it the record is read only when its fields or
      images are needed.
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
        """Whether it is cached, so that decoded images should be kept."""
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
        """Reads the record and returns the stored frames of each visual.

        Raises: DamagedError for a record that was intact when it was read before: its cached
          tokens do not belong to the blank record that now replaces it.
        """
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
        """Reads the record if that was not done yet, once even if several threads need it."""
        # Double-checked: the lock is taken only before the first read.
        if self._fields is None:
            with self._loading:
                if self._fields is None:
                    self._load()

    @property
    def fields(self) -> dict[str, Any]:
        """Returns the record's fields without its images."""
        self._require()
        assert self._fields is not None
        return self._fields

    @property
    def images(self) -> list[list[bytes | np.ndarray]]:
        """Returns images[visual][frame], encoded or decoded; [] without `with_images`."""
        self._require()
        return self._images

    @property
    def text_cost(self) -> int:
        """Returns an upper bound of the bytes of its cached text, all tokens made."""
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
        """Returns an upper bound of the bytes of the whole record in memory, whether its
        images are encoded or decoded. Valid only before images are decoded.
        """
        sizes = [
            max(len(image), 3 * self._size * self._size) + 200
            for frames in self.images
            for image in frames
        ]
        return 1_000 + sum(sizes) + self.text_cost

    def cached(self, text: str, make: Callable[[], Any]) -> Any:
        """Returns `make()`, cached under `text` ("" for all of the record's texts together):
        each epoch, and each piece of a long document, needs the same tokens again.
        """
        if text not in self.made:
            self.made[text] = make()
        return self.made[text]

    def digest(self, visual: int, frame: int) -> bytes:
        """Hashes an image's bytes on disk; valid only before the image is decoded."""
        image = self.images[visual][frame]
        assert isinstance(image, bytes), "it has been decoded"
        return hashlib.blake2b(image, digest_size=16).digest()

    def read(self, visual: int, frame: int) -> np.ndarray:
        """Decodes and resizes an image: uint8 [h, w, 3], not yet padded to a square.

        Raises: ImageError where it is missing or cannot be decoded.
        """
        stored = self.images
        if visual >= len(stored):
            raise images.ImageError(f"its texts ask for more images than the {len(stored)} it has")
        image = stored[visual][frame]
        if isinstance(image, bytes):
            image = images.decode(image, self._size, how=self._fit)
            # Keep the decoded image only if the record is cached; else its batch has a copy.
            if self.stays:
                stored[visual][frame] = image
        return image


class Failures:
    """Counts the records whose images cannot be read, logs each once, and ends the run when
    there are too many.
    """

    def __init__(self, name: str, records: int):
        self.name, self._records = name, records
        self.seen = 0
        self.failed: set[str] = set()
        self._lock = threading.Lock()

    def saw(self, count: int = 1) -> None:
        """Counts `count` records as read; raises UserError where too many have failed."""
        with self._lock:
            self.seen += count
            # A failed record is counted once, so later epochs must not dilute the fraction.
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
        """Notes that a record's images cannot be read."""
        with self._lock:
            new = record_id not in self.failed
            self.failed.add(record_id)
        if new:
            logging.warning("record %r of %s is masked: %s", record_id, self.name, error)
