"""Caches a frozen vision encoder's features on disk: each image of a split is encoded once,
and features are read instead of images.

They are stored beside the dataset, in `features_<encoder>_<split>/`, in parts of `RECORDS`
records:

    00003.npy         [images, S, C], features of the distinct images of records 300..399 (many
                      questions share an image)
    00003.counts.npy  [records], images in each record, -1 for one that was damaged on disk
    00003.places.npy  index into 00003.npy of each image, all records one after the other

An image that cannot be decoded has NaN features. A part is made again if it is incomplete,
does not match the dataset, or has a damaged record that has been repaired since.
"""

import contextlib
import errno
import logging
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines.features import is_current
from data_pipelines.open_files import OpenFiles
from data_pipelines.records import UNREADABLE, Record
from flamingo_jax.errors import StorageError, UserError
from flamingo_jax.processing.images import Fit, ImageError, pad
from flamingo_jax.progress import Bar
from flamingo_jax.storage import read_with_retries

RECORDS = 100
"""Records per part."""
BATCH = 64
"""Images per batch of the encoder."""
NOT_WRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
)
"""Write errors that persist until someone acts, as opposed to a failing storage."""


class Encoder(Protocol):
    """A frozen vision encoder.

    digest: hash of its weights, image size and dtype.
    shape: (S, C) of an image's features. dtype: of the features.
    encode: uint8 [n, H, W, 3] -> [n, S, C].
    """

    @property
    def digest(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def encode(self) -> Callable[[np.ndarray], np.ndarray]: ...


class _Part(NamedTuple):
    """The index of a part, which is held in memory while its features stay on disk.

    path: the file of features.
    counts: int64 [records], images in each record, -1 for a damaged one.
    first: int64 [records + 1], record i's images are places[first[i]:first[i + 1]].
    places: int64 [images], the index of each image's features in the file.
    start: the byte in the file at which the features begin, after the .npy header.
    """

    path: str
    counts: np.ndarray
    first: np.ndarray
    places: np.ndarray
    start: int

    @classmethod
    def load(cls, store: pathlib.Path, number: int, records: int, encoder: Encoder) -> "_Part":
        """Reads a part's index and checks it against the size of its features file.

        Raises: OSError where a file is missing or cannot be read; ValueError or EOFError where
          it is incomplete, of another encoder, or not of `records` records.
        """
        counts, places = np.load(_counts(store, number)), np.load(_places(store, number))
        path = _part(store, number)
        FILES.forget(str(path))  # An open handle may be of a file that was replaced since.
        with path.open("rb") as file:
            if (version := np.lib.format.read_magic(file)) != (1, 0):
                raise ValueError(f"{path} is of version {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), os.fstat(file.fileno()).st_size
        first = np.concatenate([[0], np.cumsum(np.maximum(counts, 0))])
        if (
            shape[1:] != encoder.shape
            or dtype.itemsize != encoder.dtype.itemsize
            or size != start + math.prod(shape) * dtype.itemsize
        ):
            raise ValueError(f"{path} is torn, or of another encoder")
        if (
            len(counts) != records
            or len(places) != first[-1]
            or (len(places) and not 0 <= places.min() <= places.max() < shape[0])
        ):
            raise ValueError(f"{path} is not of {records} records")
        return cls(str(path), counts, first, places, start)


class _File:
    """An open file descriptor that is closed when the object is garbage collected."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


FILES: OpenFiles[_File] = OpenFiles(_File)
"""The open features files of all datasets of this process."""


class CachedFeatures:
    """Reads cached features of a split's images from disk. Thread-safe.

    Files are not memory-mapped: a storage error in a mapped file kills the process with
    SIGBUS, and each mapping would hold a file open.
    """

    def __init__(self, parts: Sequence[_Part], shape: tuple[int, int], dtype: np.dtype):
        self._parts = parts
        self.shape, self.dtype = shape, dtype

    def read(self, place: int, image: int) -> np.ndarray:
        """Reads the features [S, C] of an image of record `place`.

        image: its index among all frames of all of the record's visuals.

        Raises: ImageError where the image could not be decoded; StorageError where the storage
          kept failing.
        """
        number, within = divmod(place, RECORDS)
        part = self._parts[number]
        if part.counts[within] < 0:
            raise ImageError("it was damaged on disk when its features were made")
        if image >= part.counts[within]:
            raise ImageError(f"its texts ask for more images than the {part.counts[within]} it has")
        features = read_with_retries(
            lambda: self._read(part, int(part.places[part.first[within] + image])), part.path
        )
        if np.isnan(features[0, 0]):
            raise ImageError("it could not be read when its features were made")
        return features

    def _read(self, part: _Part, place: int) -> np.ndarray:
        """Reads the features at index `place` of a part's file."""
        features = np.empty(self.shape, self.dtype)
        left = features.view(np.uint8).reshape(-1)
        at = part.start + place * features.nbytes
        try:
            file = FILES.get(part.path)
            while left.size:
                count = os.preadv(file.number, [left.data], at)
                if not count:
                    raise ImageError("the file of its features is cut short")
                left, at = left[count:], at + count
        except OSError:
            FILES.forget(part.path)
            raise
        return features


def load_or_encode(
    records: Sequence[Any],
    feature: str,
    encoder: Encoder,
    folder: pathlib.Path,
    split: str,
    *,
    image_size: int,
    mean: Sequence[float],
    image_fit: Fit = "pad",
    index: int = 0,
    count: int = 1,
) -> CachedFeatures:
    """Loads a split's cached features, after encoding the parts that are missing, incomplete
    or older than the dataset.

    Args:
      records: of the split, images encoded.
      feature: the name of the records' feature with the images.
      folder: the dataset's, in which the features are stored.
      image_size, mean, image_fit: side of the square images, the colour (0..1 per channel)
        that pads them, how they become squares.
      index, count: of processes; this one makes the parts index, index + count, ... and waits
        for the others.

    Raises:
      UserError: the folder is not writable or full, or this process does not see the parts
        that others made.
      StorageError: the storage kept failing.
    """
    store = _FeatureStore(records, encoder, folder, split)
    images = _Images(records, feature, image_size, mean, image_fit)
    store.make_missing(images, index, count)
    if count > 1:
        # A barrier: load only after all processes have written their parts.
        multihost_utils.sync_global_devices(str(store.path))
    return CachedFeatures(store.load_all(), encoder.shape, encoder.dtype)


class _FeatureStore:
    """The folder of one split's features by one encoder."""

    def __init__(self, records: Sequence[Any], encoder: Encoder, folder: pathlib.Path, split: str):
        self._records, self._encoder, self._folder = records, encoder, folder
        self.path = folder / f"features_{encoder.digest}_{split}"
        self._title = f"features of {folder.parent.name} {split}"
        self._parts = -(-len(records) // RECORDS)
        self._loaded: dict[int, _Part] = {}

    def make_missing(self, images: "_Images", index: int, count: int) -> None:
        """Makes those of the parts index, index + count, ... that are missing or outdated."""
        mine = [n for n in range(index, self._parts, count) if not self._lasts(n)]
        for number in mine:
            self._loaded.pop(number, None)
        try:
            if mine:
                self.path.mkdir(exist_ok=True)
                _make(images, self._encoder, self.path, mine, self._title)
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise StorageError(
                    f"the storage failed when features were written to {self.path} ({error}):"
                    " mend it and start again"
                ) from error
            raise UserError(
                f"the features of images could not be written to {self.path} ({error}); make room"
                " there or turn training.cache_features off"
            ) from error

    def load_all(self) -> list[_Part]:
        """Loads the index of every part; raises UserError where some are missing."""
        loaded = [self._load(number) for number in range(self._parts)]
        whole = [part for part in loaded if part is not None]
        if len(whole) < self._parts:
            raise UserError(
                f"{self.path} lacks {self._parts - len(whole)} of {self._parts} parts: put the"
                " dataset where all hosts see it, or turn training.cache_features off"
            )
        return whole

    def _lasts(self, number: int) -> bool:
        """Returns whether a part is complete, and the records that were damaged still are."""
        part = self._load(number)
        return part is not None and all(
            UNREADABLE in self._records[number * RECORDS + int(place)]
            for place in np.flatnonzero(part.counts < 0)
        )

    def _load(self, number: int) -> _Part | None:
        """Returns a part's index, or None where the part has to be made (again)."""
        if number not in self._loaded:
            part = self._read(number)
            if part is not None:
                self._loaded[number] = part
        return self._loaded.get(number)

    def _read(self, number: int) -> _Part | None:
        """Reads a part's index; None where it is missing, incomplete or outdated."""
        store = self.path
        records = min((number + 1) * RECORDS, len(self._records)) - number * RECORDS
        files = _part(store, number), _places(store, number), _counts(store, number)
        if not all(is_current(path, self._folder) for path in files):
            return None
        try:
            return read_with_retries(
                lambda: _Part.load(store, number, records, self._encoder), _part(store, number)
            )
        except (ValueError, EOFError) as error:
            logging.warning("features are made again: %s", error)
            return None


def _make(
    images_in: "_Images",
    encoder: Encoder,
    store: pathlib.Path,
    parts: list[int],
    title: str,
) -> None:
    """Encodes the images of parts and writes their files."""
    # A thread decodes the next part's images while this one encodes.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    images_of = grain.MapDataset.source(parts).map(images_in).to_iter_dataset(ahead)
    with Bar(title, len(parts)) as bar:
        done = 0
        for number, (counts, places_of, images) in zip(parts, images_of, strict=True):
            made = np.full((len(images), *encoder.shape), np.nan, encoder.dtype)
            _require_room(store, made.nbytes)
            readable = [place for place, pixels in enumerate(images) if pixels is not None]
            for start in range(0, len(readable), BATCH):
                places = readable[start : start + BATCH]
                # Fill the last batch with its first image: one shape, so one compilation.
                batch = np.stack(
                    [images[place] for place in places]
                    + [images[places[0]]] * (BATCH - len(places))
                )
                made[places] = encoder.encode(batch)[: len(places)]
            # The features last: a killed process must not leave them without their index.
            _write(_counts(store, number), counts)
            _write(_places(store, number), places_of)
            _write(_part(store, number), made)
            done += len(places_of)
            bar.advance(1, f"{done:,} images")


class _Images:
    """Decodes a part's images and removes duplicates.

    Calling it with a part's number returns (counts, places, distinct images): counts and
    places as in the files, images uint8 [H, W, 3] or None where one cannot be decoded.
    """

    def __init__(
        self,
        records: Sequence[Any],
        feature: str,
        image_size: int,
        mean: Sequence[float],
        fit: Fit,
    ):
        self._records, self._feature, self._size, self._mean, self._fit = (
            records,
            feature,
            image_size,
            mean,
            fit,
        )

    def __call__(self, part: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
        counts, places = [], []
        images: list[np.ndarray | None] = []
        met: dict[bytes, int] = {}
        for place in range(part * RECORDS, min((part + 1) * RECORDS, len(self._records))):
            record = Record(self._records, place, self._feature, self._size, self._fit)
            if record.damaged:
                counts.append(-1)
                continue
            counts.append(sum(record.frame_counts))
            for visual, frames in enumerate(record.frame_counts):
                for frame in range(frames):
                    key = record.digest(visual, frame)
                    if key not in met:
                        met[key] = len(images)
                        images.append(self._image(record, visual, frame))
                    places.append(met[key])
        return np.array(counts, np.int64), np.array(places, np.int64), images

    def _image(self, record: Record, visual: int, frame: int) -> np.ndarray | None:
        try:
            return pad(record.read(visual, frame), self._size, self._mean)
        except ImageError as error:
            logging.warning("record %r has no features: %s", record.id, error)
            return None


def _part(store: pathlib.Path, number: int) -> pathlib.Path:
    return store / f"{number:05d}.npy"


def _counts(store: pathlib.Path, number: int) -> pathlib.Path:
    return store / f"{number:05d}.counts.npy"


def _places(store: pathlib.Path, number: int) -> pathlib.Path:
    return store / f"{number:05d}.places.npy"


def _write(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes an array atomically, through a temporary file in the same folder."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.npy")
    try:
        np.save(temporary, values)
        temporary.replace(path)
    except OSError:
        # Do not leave half a file on a disk that is full.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _require_room(store: pathlib.Path, size: int) -> None:
    """Raises OSError (ENOSPC) where fewer than `size` bytes are free."""
    free = shutil.disk_usage(store).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{size / 2**20:,.0f} MiB are needed for the next part, and {free / 2**20:,.0f} are"
            " free",
        )
