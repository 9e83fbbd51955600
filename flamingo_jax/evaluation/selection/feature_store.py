"""Keeps the frozen encoder's features of a set on disk, so that they are computed once.

    <folder>/index.json         the set, its encoder, and the finished shards with digests
    <folder>/shard-<first>.npy  features [n, C] of the set's rows from <first> on

Each shard is written before the index names it. A process that is killed loses what it had
computed since the last shard, at most `SHARD_BYTES` or `SHARD_SECONDS`; the next one goes on
from there. Processes that share the work each have a store of their own rows.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from flamingo_jax import paths
from flamingo_jax.checkpointing.manifest import write_atomically
from flamingo_jax.configuring import from_json
from flamingo_jax.errors import UserError
from flamingo_jax.folder_lock import lock_folder
from flamingo_jax.storage import LASTING, read_with_retries

FORMAT = 1
INDEX_FILE = "index.json"
SHARD_BYTES = 64 << 20
"""The most bytes of a shard's rows, of which there is at least one; it is read whole."""
SHARD_SECONDS = 60.0
"""Seconds after which a shard is written, however few rows it has."""
MOST_INDEX_BYTES = 64 << 20
MOST_SHARD_BYTES = 4 * SHARD_BYTES
MOST_HEADER_BYTES = 4096
"""More than the header of a shard has, in whichever version of NumPy's format."""
DTYPES = ("float16", "float32")


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """What the features are of.

    encoder: the digest of the encoder. dataset: identifies the set's content and its order.
    rows: the size of the set. dtype: "float16" or "float32".
    """

    encoder: str
    dataset: str
    rows: int
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class FeatureShard:
    """A finished file: its rows, and the BLAKE2b of its bytes."""

    file: str
    rows: int
    digest: str


@dataclasses.dataclass(frozen=True)
class FeatureIndex:
    """The content of index.json. width: C; 0 before the first shard."""

    features: FeatureSet
    width: int = 0
    shards: tuple[FeatureShard, ...] = ()
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Returns the number of rows in finished shards."""
        return sum(shard.rows for shard in self.shards)


class FeatureStore:
    """The features of one set in a folder of its own; see the module for its files.

    Raises: UserError where the folder has an index that is damaged, or is of something else.
    """

    def __init__(self, folder: pathlib.Path, features: FeatureSet):
        if features.dtype not in DTYPES:
            raise ValueError(f"dtype is {features.dtype!r}, but must be one of {DTYPES}")
        self.folder, self.features = folder, features
        self.index = self._read_index()

    @property
    def complete(self) -> bool:
        """Returns whether the features of the whole set are stored."""
        return self.index.rows == self.features.rows

    def fill(
        self,
        encode: Callable[[int, int], np.ndarray],
        *,
        batch: int = 256,
        progress: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Computes and stores what is missing.

        Args:
          encode: (first, stop) -> the features [stop - first, C] of these rows of the set.
          batch: the most rows that are computed in one call.
          progress: called with the number of rows after each call.

        Raises: UserError where another process fills the folder, or features are not finite.
        """
        if self.complete:
            return
        with lock_folder(self.folder, "a computation of features"):
            # Another process may have filled it meanwhile.
            self.index = self._read_index()
            done = self.index.rows
            shard, held = np.empty((0, 0), self.features.dtype), 0
            began = time.monotonic()
            while done < self.features.rows:
                stop = min(done + batch, self.features.rows)
                features = self._checked(encode(done, stop), done, stop)
                done = stop
                progress(len(features))
                while len(features):
                    if not shard.size:
                        shard = np.empty(self._shard_shape(), self.features.dtype)
                    taken = min(len(features), len(shard) - held)
                    shard[held : held + taken] = features[:taken]
                    held, features = held + taken, features[taken:]
                    late = time.monotonic() - began >= SHARD_SECONDS
                    if held == len(shard) or late or done == self.features.rows:
                        self._write(shard[:held])
                        held, began = 0, time.monotonic()

    def _shard_shape(self) -> tuple[int, int]:
        """Returns (rows, C) of a full shard."""
        width = self.index.width
        full = max(1, SHARD_BYTES // (width * np.dtype(self.features.dtype).itemsize))
        return min(full, self.features.rows), width

    def blocks(self) -> Iterator[np.ndarray]:
        """Reads the features [n, C] shard by shard, in the order of the set, one shard ahead.

        Raises: UserError for a shard that is missing or damaged.
        """
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[np.ndarray] | None = None
            for shard in self.index.shards:
                following = reader.submit(self._read, shard)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def rows(self) -> np.ndarray:
        """Reads all features at once, [S, C]."""
        return np.concatenate(
            [np.zeros((0, self.index.width), self.features.dtype), *self.blocks()]
        )

    def _checked(self, features: np.ndarray, first: int, stop: int) -> np.ndarray:
        width = self.index.width or (features.shape[1] if features.ndim == 2 else 0)
        if features.shape != (stop - first, width) or not width:
            raise ValueError(
                f"features of rows {first} to {stop} have the shape {features.shape}, but must"
                f" have {(stop - first, width or 'C')}"
            )
        self.index = dataclasses.replace(self.index, width=width)
        if not np.isfinite(features).all():
            bad = first + int(np.argmax(~np.isfinite(features).all(axis=1)))
            raise UserError(
                f"the features of image {bad} are not finite, so that nothing is similar to it:"
                " load the model in float32, or export a checkpoint from before it diverged"
            )
        return features

    def _write(self, features: np.ndarray) -> None:
        name = f"shard-{self.index.rows:012}.npy"
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, np.lib.format.header_data_from_array_1_0(features)
        )
        # Neither copies the array, and both let the other run.
        stored = header.getvalue(), features.data.cast("B")
        with ThreadPoolExecutor(1) as hasher:
            digest = hasher.submit(_digest, *stored)
            write_atomically(self.folder / name, *stored)
        shard = FeatureShard(name, len(features), digest.result())
        index = dataclasses.replace(self.index, shards=(*self.index.shards, shard))
        text = json.dumps(dataclasses.asdict(index), indent=1)
        write_atomically(self.folder / INDEX_FILE, text.encode())
        self.index = index

    def _read_index(self) -> FeatureIndex:
        file = self.folder / INDEX_FILE
        if not file.is_file():
            return FeatureIndex(self.features)
        try:
            if file.stat().st_size > MOST_INDEX_BYTES:
                raise ValueError(f"it has more than {MOST_INDEX_BYTES} bytes")
            found = json.loads(read_with_retries(file.read_bytes, file, LASTING))
            index = from_json(FeatureIndex, found)
            _require_sound(index)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, UserError) as error:
            raise self._damage(INDEX_FILE, str(error)) from error
        if index.features != self.features:
            raise UserError(
                f"{self.folder} has the features of another set or encoder: name another folder,"
                " or remove it"
            )
        return index

    def _read(self, shard: FeatureShard) -> np.ndarray:
        file = self.folder / shard.file
        try:
            if file.stat().st_size > MOST_SHARD_BYTES:
                raise ValueError(f"it has more than {MOST_SHARD_BYTES} bytes")
            content = read_with_retries(lambda: _content(file), file, LASTING)
            if _digest(content.data) != shard.digest:
                raise ValueError("its bytes have another digest than the index says")
            header = io.BytesIO(content[:MOST_HEADER_BYTES].tobytes())
            np.lib.format.read_magic(header)
            shape, _, dtype = np.lib.format.read_array_header_1_0(header)
            if shape != (shard.rows, self.index.width) or str(dtype) != self.features.dtype:
                raise ValueError("it has another shape or dtype than the index says")
            # A view: the array is not copied.
            return content[header.tell() :].view(dtype).reshape(shape)
        except (ValueError, OSError) as error:
            raise self._damage(shard.file, str(error)) from error

    def _damage(self, name: str, reason: str) -> UserError:
        return UserError(
            f"{self.folder / name} of the stored features is damaged or missing ({reason}):"
            f" remove {self.folder}, and they are computed again"
        )


def set_identity(digests: Iterable[bytes]) -> str:
    """Identifies a set by the digests of its members (`Visual.digest`) and their order."""
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _content(file: pathlib.Path) -> np.ndarray:
    """Reads the bytes of a file, uint8 [n]."""
    if paths.is_bucket(file):
        return np.frombuffer(file.read_bytes(), np.uint8)
    return np.fromfile(file, np.uint8)


def _digest(*content: bytes | memoryview) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def _require_sound(index: FeatureIndex) -> None:
    """Raises ValueError for an index that no store writes."""
    first = 0
    if index.format != FORMAT:
        raise ValueError(f"its format is {index.format}, but this version reads {FORMAT}")
    for shard in index.shards:
        # The name is fixed, so that an index cannot point at other files.
        if shard.file != f"shard-{first:012}.npy" or shard.rows < 1:
            raise ValueError(f"it names the shard {shard.file!r} of {shard.rows} rows")
        first += shard.rows
    if first > index.features.rows or (first and index.width < 1):
        raise ValueError(f"it has {first} rows of {index.features.rows}")
