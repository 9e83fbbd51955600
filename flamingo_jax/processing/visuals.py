"""Images and videos in prompts.

`Image` and `Video` are what users pass: a path, bytes, PIL images or arrays of any size. They
are checked when they are made. A `Visual` is one of them preprocessed for a model, once its
config is known: frames of the model's image size.
"""

import abc
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import VisionConfig
from flamingo_jax.processing import images

MAX_FILE_BYTES = 1 << 30
"""Larger image files are refused without reading them."""
TRAINED_FPS = 1.0
"""Frame rate of videos in training (paper 3.2)."""

ImageSource = str | os.PathLike[str] | bytes | PIL.Image.Image | np.ndarray
"""What `Image` takes; also anything that numpy converts to an array, such as a jax.Array."""
VideoSource = str | os.PathLike[str] | bytes | np.ndarray | Sequence[ImageSource]
"""What `Video` takes: a file, or frames."""


@dataclasses.dataclass(frozen=True, eq=False)
class Visual:
    """An image or a clip, preprocessed for a model.

    frames: uint8 [T, H, W, 3] in 0..255, H and W the model's image size, T = 1 for an image.

    Raises: UserError for another dtype or rank. H and W are checked where the visual is used.
    """

    frames: np.ndarray

    def __post_init__(self) -> None:
        frames = self.frames
        if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8:
            kind = frames.dtype if isinstance(frames, np.ndarray) else type(frames).__name__
            raise UserError(
                f"the frames of a visual are {kind}, but must be a numpy array of uint8 in"
                " 0..255: give floats in 0..1 as np.round(255 * frames).astype(np.uint8)"
            )
        if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise UserError(
                f"the frames of a visual have the shape {list(frames.shape)}, but must be [T,"
                " H, W, 3]: give one image as image[None], a grey one as three equal channels"
            )

    @functools.cached_property
    def digest(self) -> bytes:
        """Hashes the pixels, so that equal images are encoded once, whatever their source."""
        return hashlib.blake2b(
            str(self.frames.shape).encode() + np.ascontiguousarray(self.frames).tobytes(),
            digest_size=16,
        ).digest()


class VisualSource(abc.ABC):
    """An image or a video of any size, which a model's config turns into a `Visual`."""

    def __init__(self) -> None:
        self._prepared: dict[Any, Visual] = {}

    def visual(self, vision: VisionConfig, frames: int) -> Visual:
        """Preprocesses the source for a model; the result is cached for each preprocessing.

        Args:
          vision: the image size, the mean colour and how images become squares (`image_fit`).
          frames: the most frames of a video, as many as the model was trained with.

        Raises: UserError where the pixels cannot be decoded.
        """
        key = (vision.image_size, vision.mean, vision.image_fit, frames)
        if key not in self._prepared:
            self._prepared[key] = Visual(self._frames(vision, frames))
        return self._prepared[key]

    @abc.abstractmethod
    def _frames(self, vision: VisionConfig, frames: int) -> np.ndarray:
        """Decodes and preprocesses frames: uint8 [T, S, S, 3], S the model's image size."""


class Image(VisualSource):
    """An image of any size in a prompt.

    The model that it is passed to preprocesses it: it is turned by its EXIF orientation,
    converted to RGB (transparent parts become white), resized and, unless the model's config
    says otherwise, padded to a square with the mean colour (paper 3.2). This happens when the
    model runs, so do not modify an array or PIL image before that.

    Args:
      source: the path of an image file, its bytes (PNG, JPEG, WebP, ...), a PIL image, or an
        array uint8 [H, W, 3] (also grey [H, W] or RGBA [H, W, 4]) of values in 0..255.

    Raises: UserError where a file cannot be read or is not an image, an image has more than 64
      million pixels, or an array has another dtype or shape (such as floats in 0..1).
    """

    def __init__(self, source: ImageSource):
        super().__init__()
        self._name = "an image"
        self._source: bytes | PIL.Image.Image
        if isinstance(source, (str, os.PathLike)):
            self._name = os.fspath(source)
            source = _read(pathlib.Path(source))
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._source = bytes(source)
            self._attempt(lambda: images.check(bytes(source)))
        elif isinstance(source, PIL.Image.Image):
            self._source = source
            self._attempt(lambda: images.check_size(source.width, source.height))
        else:
            pixels = _pixels(source, "fj.Image", ndims=(2, 3))
            self._attempt(lambda: images.check_size(pixels.shape[1], pixels.shape[0]))
            self._source = PIL.Image.fromarray(pixels)

    def __repr__(self) -> str:
        return f"Image({self._name!r})"

    def _frames(self, vision: VisionConfig, frames: int) -> np.ndarray:
        source, form = self._source, (vision.image_size, vision.mean, vision.image_fit)
        if isinstance(source, bytes):
            return self._attempt(lambda: images.load(source, *form))[None]
        return self._attempt(lambda: images.prepare(source, *form))[None]

    def _attempt(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except images.ImageError as error:
            raise _unreadable(self._name, error) from error


class Video(VisualSource):
    """A video in a prompt: frames sampled from its middle, each preprocessed as an `Image` is.

    Args:
      source: the path of a video file, its bytes (MP4, WebM, GIF, ...), an array uint8 [T, H,
        W, 3], or a sequence of frames, each of which `Image` takes.
      fps: frame rate to sample a file at; by default 1, as in training (the paper evaluates
        with 30 frames at 3 fps). Not allowed with an array or frames: pass those at the rate
        you want.
      frames: the most frames, from the middle; by default as many as the model was trained
        with. For more, temporal embeddings are interpolated (paper 3.2).
      start, end: seconds of the part of a file that is taken; by default all of it. Only this
        part is decoded, where the file says when its frames are shown.

    Raises: UserError where a file cannot be read or is not a video, a frame has a wrong dtype
      or shape, or `fps` is given with frames.
    """

    def __init__(
        self,
        source: VideoSource,
        *,
        fps: float | None = None,
        frames: int | None = None,
        start: float | None = None,
        end: float | None = None,
    ):
        super().__init__()
        self._most, self._start, self._end = frames, start or 0.0, end
        self._fps = TRAINED_FPS if fps is None else fps
        self._name = "a video"
        self._source: pathlib.Path | bytes | list[Image]
        if frames is not None and frames < 1:
            raise UserError(f"fj.Video was asked for {frames} frames: ask for 1 or more")
        if not 1e-3 <= self._fps <= 1e3:
            raise UserError(f"fj.Video was asked for {fps} frames a second: ask for 0.001 to 1000")
        if not 0 <= self._start < math.inf or (end is not None and not end >= self._start):
            raise UserError(
                f"fj.Video was asked for the part from {start} to {end} seconds: give a start of 0"
                " or more, and an end after it"
            )
        if isinstance(source, (str, os.PathLike)):
            self._source = pathlib.Path(source)
            self._name = str(self._source)
            _check_file(self._source)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            self._source = bytes(source)
        elif fps is not None:
            raise UserError(
                "fj.Video was given frames and fps, but frames have no clock: choose those at"
                " the rate that you want, and leave fps out"
            )
        else:
            self._source = _frames_of(source)
        if not isinstance(self._source, list):
            self._with_file(_check_video)

    def __repr__(self) -> str:
        return f"Video({self._name!r})"

    def _frames(self, vision: VisionConfig, frames: int) -> np.ndarray:
        from flamingo_jax.processing.video import middle_clip, read_middle

        most = self._most or frames
        if isinstance(self._source, list):
            kept = middle_clip(len(self._source), most)
            return np.concatenate([self._source[n].visual(vision, 1).frames for n in kept])
        size, how = vision.image_size, vision.image_fit
        found = self._with_file(
            lambda path: read_middle(
                path,
                fps=self._fps,
                frames=most,
                start=self._start,
                end=self._end,
                resize=lambda frame: images.fit(frame, size, how),
            )
        )
        return np.stack([images.pad(frame, size, vision.mean) for frame in found.frames])

    def _with_file(self, use: Callable[[pathlib.Path], Any]) -> Any:
        """Calls `use` with the path of the video; bytes are written to a temporary file."""
        import av

        from flamingo_jax.processing.video_file import VideoError

        given = self._source
        try:
            if isinstance(given, pathlib.Path):
                return use(given)
            assert isinstance(given, bytes)
            with tempfile.NamedTemporaryFile(suffix=".video") as file:
                file.write(given)
                file.flush()
                return use(pathlib.Path(file.name))
        except (VideoError, av.FFmpegError, OSError) as error:
            why = error.reason if isinstance(error, VideoError) else error.strerror
            if isinstance(given, bytes):
                said = f"the bytes of a video cannot be read ({why})"
            else:
                said = f"{given} is not a readable video ({why})"
            raise UserError(f"{said}: give a whole video file, such as an MP4") from error


def check_visual(encoded: Sequence[bytes], name: str) -> None:
    """Checks by their headers that encoded frames are images of a size that is read.

    Raises: UserError that mentions `name`.
    """
    try:
        for data in encoded:
            images.check(data)
    except images.ImageError as error:
        raise _unreadable(name, error) from error


def read_visual(encoded: Sequence[bytes], vision: VisionConfig, name: str) -> Visual:
    """Decodes the encoded frames of one image or clip to a Visual of the model's size.

    Raises: UserError that mentions `name` where a frame cannot be decoded or there are none.
    """
    try:
        frames = [
            images.load(data, vision.image_size, vision.mean, vision.image_fit) for data in encoded
        ]
    except images.ImageError as error:
        raise _unreadable(name, error) from error
    if not frames:
        raise UserError(f"{name} has no image: leave it out")
    return Visual(np.stack(frames))


def _unreadable(name: str, error: images.ImageError) -> UserError:
    return UserError(f"{name}: unreadable image ({error}): replace it by a whole PNG or JPEG file")


def _frames_of(source: Any) -> list[Image]:
    """Converts an array [T, H, W, 3] or a list of frames to Images."""
    if not isinstance(source, (list, tuple)):
        source = _pixels(source, "fj.Video", ndims=(4,))
    if not len(source):
        raise UserError("fj.Video was given no frames: give one or more")
    return [frame if isinstance(frame, Image) else Image(frame) for frame in source]


def _pixels(source: Any, name: str, ndims: Sequence[int]) -> np.ndarray:
    """Checks that a source is an array of uint8 pixels with a rank in `ndims`.

    Raises: UserError that says what `name` takes.
    """
    wanted = "[T, H, W, 3]" if 4 in ndims else "[H, W, 3]"
    if not isinstance(source, np.ndarray) and not hasattr(source, "__array__"):
        raise UserError(
            f"{name} was given a {type(source).__name__}, but takes a path, bytes, a PIL image or"
            f" an array uint8 {wanted}: convert it to one of these"
        )
    array = np.asarray(source)
    if array.dtype != np.uint8:
        raise UserError(
            f"{name} was given an array of {array.dtype}, but pixels are uint8 in 0..255: give"
            " floats in 0..1 as np.round(255 * array).astype(np.uint8)"
        )
    if array.ndim == 3 and 3 in ndims and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in ndims or not array.size or (array.ndim > 2 and array.shape[-1] < 3):
        raise UserError(
            f"{name} was given an array of shape {list(array.shape)}, but pixels are {wanted}:"
            " move the channels last, and give each image or video on its own"
        )
    if array.ndim > 2 and array.shape[-1] > 4:
        raise UserError(
            f"{name} was given an array of shape {list(array.shape)}, whose last axis should be 3"
            f" channels: move the channels last, as {wanted}"
        )
    return array


def _read(path: pathlib.Path) -> bytes:
    """Reads an image file; raises UserError where it is missing, too large or unreadable."""
    _check_file(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} has more than {MAX_FILE_BYTES} bytes: give a smaller image")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its path") from error


def _check_file(path: pathlib.Path) -> None:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"{path} {what}: name a file")


def _check_video(path: pathlib.Path) -> None:
    """Opens a video, so that a bad file is reported when the `Video` is made.

    Raises: VideoError.
    """
    from flamingo_jax.processing.video_file import opened

    with opened(path):
        pass
