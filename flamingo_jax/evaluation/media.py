"""Images and clips of examples, read when they are needed.

An example names its image or clip (`MediaRef`); a pool of threads decodes those of the next queries
while the model answers the current ones (`MediaPool`), so that memory does not grow with the set.
"""

import abc
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig, VisionConfig
from flamingo_jax.processing.visuals import Image, Video, Visual

POOL_BYTES = 512 << 20
"""Size of the decoded visuals that a pool keeps, besides those that were asked for just now."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How a model's images and clips are read.

    vision: the image size, the mean colour and how images become squares.
    frames: the most frames of a clip, from its middle.
    fps: frames a second of clips; None for the rate of training.
    """

    vision: VisionConfig
    frames: int
    fps: float | None = None

    @classmethod
    def of(
        cls, config: FlamingoConfig, frames: int | None = None, fps: float | None = None
    ) -> "Preprocessing":
        """Returns the preprocessing of a model, by default with as many frames as in training."""
        return cls(config.vision, frames or config.resampler.frames, fps)


class MediaRef(abc.ABC):
    """An image or a clip that is read when it is needed."""

    @property
    @abc.abstractmethod
    def key(self) -> str:
        """Identifies the pixels: media with equal keys are the same."""

    @property
    def still(self) -> bool:
        """Returns whether it is an image, of one frame."""
        return True

    @abc.abstractmethod
    def read(self, how: Preprocessing) -> Visual:
        """Decodes and preprocesses it.

        Raises: UserError that names the file or record that cannot be decoded.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedMedia(MediaRef):
    """A visual that is in memory already."""

    visual: Visual

    @property
    def key(self) -> str:
        """Returns the digest of its pixels."""
        return self.visual.digest.hex()

    @property
    def still(self) -> bool:
        """Returns whether it has one frame."""
        return len(self.visual.frames) == 1

    def read(self, how: Preprocessing) -> Visual:
        """Returns the visual, which must have been preprocessed in this way."""
        return self.visual


@dataclasses.dataclass(frozen=True)
class ImageFile(MediaRef):
    """An image file of a benchmark; `there` is False where the file is missing."""

    path: pathlib.Path
    there: bool = True

    @functools.cached_property
    def key(self) -> str:  # type: ignore[override]
        """Returns a digest of the file's path, size and time of change."""
        return _file_key(self.path)

    def read(self, how: Preprocessing) -> Visual:
        """Decodes the image; raises UserError."""
        return Image(self.path).visual(how.vision, 1)


@dataclasses.dataclass(frozen=True)
class ClipFile(MediaRef):
    """A video file of a benchmark, or a part of one.

    start, end: seconds of the part; None for the file's own beginning or end.
    there: False where the file is missing.
    """

    path: pathlib.Path
    start: float | None = None
    end: float | None = None
    there: bool = True

    @functools.cached_property
    def key(self) -> str:  # type: ignore[override]
        """Returns a digest of the file's path, size and time of change, and the part."""
        return f"{_file_key(self.path)}:{self.start}-{self.end}"

    @property
    def still(self) -> bool:
        """Returns False."""
        return False

    def read(self, how: Preprocessing) -> Visual:
        """Decodes the frames in the middle of the part; raises UserError."""
        clip = Video(self.path, fps=how.fps, start=self.start, end=self.end)
        return clip.visual(how.vision, how.frames)


@dataclasses.dataclass(frozen=True)
class ComputedMedia(MediaRef):
    """A visual that a function makes, such as from a record of a dataset.

    name: identifies the pixels.
    frames: 1 for an image.
    """

    name: str
    make: Callable[[Preprocessing], Visual]
    frames: int = 1

    @property
    def key(self) -> str:
        """Returns the name."""
        return self.name

    @property
    def still(self) -> bool:
        """Returns whether it is an image."""
        return self.frames == 1

    def read(self, how: Preprocessing) -> Visual:
        """Calls the function."""
        return self.make(how)


def _file_key(path: pathlib.Path) -> str:
    """Identifies a file's content without reading it."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its path") from error
    # Files of one name, size and time in two folders are different images.
    told = f"{path.absolute()}/{found.st_size}/{found.st_mtime_ns}"
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


class MediaPool:
    """Decodes media in threads, and keeps the last ones.

    how: the model's preprocessing.
    threads: by default one for each core.
    most_bytes: of decoded visuals that are kept besides those asked for at the time; by default
      `POOL_BYTES`.
    waited: seconds that `read` has waited for decoding in all.
    """

    def __init__(
        self, how: Preprocessing, *, threads: int | None = None, most_bytes: int | None = None
    ):
        self.how, self.waited = how, 0.0
        self._most_bytes = POOL_BYTES if most_bytes is None else most_bytes
        self._threads = concurrent.futures.ThreadPoolExecutor(threads or os.cpu_count() or 1)
        self._found: collections.OrderedDict[str, concurrent.futures.Future[Visual]] = (
            collections.OrderedDict()
        )

    def __enter__(self) -> "MediaPool":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def prefetch(self, media: Iterable[MediaRef]) -> None:
        """Starts to decode media that are not kept."""
        for one in media:
            key = one.key
            if key in self._found:
                self._found.move_to_end(key)
            else:
                self._found[key] = self._threads.submit(one.read, self.how)

    def read(self, media: Sequence[MediaRef]) -> list[Visual]:
        """Returns the visuals of media, decoding those that are not kept.

        Raises: UserError for one that cannot be decoded.
        """
        self.prefetch(media)
        asked = [self._found[one.key] for one in media]
        began = time.monotonic()
        visuals = [future.result() for future in asked]
        self.waited += time.monotonic() - began
        return visuals

    def drop_unused(self, used: Iterable[MediaRef]) -> None:
        """Drops the visuals that were not asked for longest, but none of `used`, until the
        others fit in `most_bytes`.
        """
        kept = {one.key for one in used}
        done = {
            key: future.result().frames.nbytes
            for key, future in self._found.items()
            if key not in kept and future.done() and not future.exception()
        }
        size = sum(done.values())
        for key, nbytes in done.items():
            if size <= self._most_bytes:
                break
            del self._found[key]
            size -= nbytes
