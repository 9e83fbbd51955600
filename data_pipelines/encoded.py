"""A frozen encoder's features of every picture of a split: made once, kept beside the dataset, read in the pictures' place.

`<dataset>/features_<encoder>_<split>/00003.npy` holds those of the different pictures of records 3 * RECORDS to 4 * RECORDS, of which many
may share one (questions do), `00003.counts.npy` how many pictures each of these has, and `00003.places.npy` where each picture's features are.
A picture that cannot be read is NaN throughout. A part is there whole or not at all.
"""

import logging
import pathlib
import shutil
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from jax.experimental import multihost_utils

from data_pipelines.features import is_current
from data_pipelines.records import Record
from flamingo_jax.errors import UserError
from flamingo_jax.processing.images import ImageError, pad
from flamingo_jax.progress import Bar

RECORDS = 100
"""Records to a part."""
BATCH = 64
"""Pictures encoded at once."""


class Encoder(Protocol):
    """A frozen vision encoder, as data pipelines know it.

    digest: names weights, picture size and type. shape, dtype: those of a picture's features, [S, C]. encode: uint8 [n, H, W, 3] -> [n, S, C].
    """

    @property
    def digest(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def encode(self) -> Callable[[np.ndarray], np.ndarray]: ...


class EncodedPictures:
    """The features of a split's pictures, mapped from disk. Safe to use from several threads."""

    def __init__(self, folder: pathlib.Path, parts: int, shape: tuple[int, int], dtype: np.dtype):
        # numpy stores bfloat16 as bytes without a meaning; a plain array over the mapped file is read with less work than a memmap.
        self._parts = [np.asarray(np.load(_part(folder, number), mmap_mode="r")).view(dtype) for number in range(parts)]
        self._first = [np.concatenate([[0], np.cumsum(np.load(_counts(folder, number)))]) for number in range(parts)]
        self._places = [np.load(_places(folder, number)) for number in range(parts)]
        self.shape, self.dtype = shape, dtype

    def read(self, place: int, picture: int) -> np.ndarray:
        """[S, C] of a record's picture, counted over all of its visuals and frames. Raises ImageError."""
        part, within = divmod(place, RECORDS)
        first, after = self._first[part][within : within + 2]
        if picture >= after - first:
            raise ImageError(f"its texts ask for more pictures than the {after - first} it has")
        features = self._parts[part][self._places[part][first + picture]]
        if np.isnan(features[0, 0]):
            raise ImageError("it could not be read when its features were made")
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
    index: int = 0,
    count: int = 1,
) -> EncodedPictures:
    """From the dataset's folder; parts that are missing there, or older than the dataset, are made first.

    Args:
      feature: the feature of a record that holds its pictures.
      image_size, mean: side of the square pictures, and the colour (0..1 a channel) that pads them.
      index, count: this process makes the parts index, index + count, ... and waits for the others.

    Raises:
      UserError: the folder cannot be written to or has too little room, or parts are missing after all.
    """
    store = folder / f"features_{encoder.digest}_{split}"
    parts = -(-len(records) // RECORDS)
    whole = lambda number: all(is_current(path, folder) for path in (_part(store, number), _places(store, number)))
    mine = [number for number in range(index, parts, count) if not whole(number)]
    try:
        if mine:
            store.mkdir(exist_ok=True)
            _make(_Pictures(records, feature, image_size, mean), encoder, store, mine, f"features of {folder.parent.name} {split}")
    except OSError as error:
        raise UserError(f"the features of pictures could not be written to {store} ({error}); make room there or turn training.cache_features off") from error
    if count > 1:
        multihost_utils.sync_global_devices(str(store))
    missing = [number for number in range(parts) if not _part(store, number).exists()]
    if missing:
        raise UserError(f"{store} lacks {len(missing)} of {parts} parts: put the dataset where all hosts see it, or turn training.cache_features off")
    return EncodedPictures(store, parts, encoder.shape, encoder.dtype)


def _make(pictures_in: "_Pictures", encoder: Encoder, store: pathlib.Path, parts: list[int], title: str) -> None:
    # A thread decodes the next part's pictures meanwhile.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    pictures_of = grain.MapDataset.source(parts).map(pictures_in).to_iter_dataset(ahead)
    with Bar(title, len(parts)) as bar:
        done = 0
        for number, (counts, places_of, pictures) in zip(parts, pictures_of, strict=True):
            made = np.full((len(pictures), *encoder.shape), np.nan, encoder.dtype)
            _require_room(store, made.nbytes)
            readable = [place for place, pixels in enumerate(pictures) if pixels is not None]
            for start in range(0, len(readable), BATCH):
                places = readable[start : start + BATCH]
                # One shape for all, so that the encoder is compiled once.
                batch = np.stack([pictures[place] for place in places] + [pictures[places[0]]] * (BATCH - len(places)))
                made[places] = encoder.encode(batch)[: len(places)]
            _write(_counts(store, number), counts)
            _write(_places(store, number), places_of)
            _write(_part(store, number), made)
            done += len(places_of)
            bar.advance(1, f"{done:,} pictures")


class _Pictures:
    """A part's pictures: how many each record has, for all in a row which of the different ones it is, and these, with None for what cannot be read."""

    def __init__(self, records: Sequence[Any], feature: str, image_size: int, mean: Sequence[float]):
        self._records, self._feature, self._size, self._mean = records, feature, image_size, mean

    def __call__(self, part: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray | None]]:
        counts, places = [], []
        pictures: list[np.ndarray | None] = []
        met: dict[bytes, int] = {}
        for place in range(part * RECORDS, min((part + 1) * RECORDS, len(self._records))):
            record = Record(self._records, place, self._feature, self._size)
            counts.append(sum(record.frame_counts))
            for visual, frames in enumerate(record.frame_counts):
                for frame in range(frames):
                    key = record.digest(visual, frame)
                    if key not in met:
                        met[key] = len(pictures)
                        pictures.append(self._picture(record, visual, frame))
                    places.append(met[key])
        return np.array(counts, np.int64), np.array(places, np.int64), pictures

    def _picture(self, record: Record, visual: int, frame: int) -> np.ndarray | None:
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
    temporary = path.with_name(f".{uuid.uuid4().hex}.npy")
    np.save(temporary, values)
    temporary.replace(path)


def _require_room(store: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(store).free
    if free < size:
        raise OSError(f"{size / 2**20:,.0f} MiB are needed for the next part, and {free / 2**20:,.0f} are free")
