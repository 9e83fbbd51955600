"""What a model sees in a prompt: an image or a video from wherever it is, checked where it is
given and brought to the model's form where its config is known.

`Image` and `Video` are sources: a path, bytes, PIL images or arrays of any size. A `Visual` is
one of them as the model takes it: frames of the model's size.
"""

import abc
import dataclasses
import functools
import hashlib
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
"""Larger files of one image, and larger videos given as bytes, are refused unread."""
TRAINED_FPS = 1.0
"""Frames a second of videos in training (paper 3.2)."""

ImageSource = str | os.PathLike[str] | bytes | PIL.Image.Image | np.ndarray
"""What `Image` takes; also whatever numpy makes such an array of, as a jax.Array."""
VideoSource = str | os.PathLike[str] | bytes | np.ndarray | Sequence[ImageSource]
"""What `Video` takes: a file, or frames."""


@dataclasses.dataclass(frozen=True, eq=False)
class Visual:
    """An image or a clip as the model takes it: `frames` uint8 [T, H, W, 3] in 0..255, T = 1
    for an image.

    Raises: UserError for any other array. Whether H and W are the model's is checked where it
      is used.
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
        """Names the pixels: equal images are encoded once, wherever they came from."""
        return hashlib.blake2b(
            str(self.frames.shape).encode() + np.ascontiguousarray(self.frames).tobytes(),
            digest_size=16,
        ).digest()


class VisualSource(abc.ABC):
    """An image or a video of any size, which becomes a `Visual` for a model's config."""

    def __init__(self) -> None:
        self._prepared: dict[Any, Visual] = {}

    def visual(self, vision: VisionConfig, frames: int) -> Visual:
        """Makes the `Visual` that a model takes, the first time for each form it is asked for.

        Args:
          vision: size, mean colour and how an image becomes a square (`image_fit`).
          frames: of a video at most, as many as the model was trained with.

        Raises: UserError where the pixels cannot be decoded.
        """
        key = (vision.image_size, vision.mean, vision.image_fit, frames)
        if key not in self._prepared:
            self._prepared[key] = Visual(self._frames(vision, frames))
        return self._prepared[key]

    @abc.abstractmethod
    def _frames(self, vision: VisionConfig, frames: int) -> np.ndarray:
        """Reads uint8 [T, S, S, 3], S being the model's image size."""


class Image(VisualSource):
    """An image in a prompt, of any size; the model's own preprocessing is done where it is used
    (paper 3.2: padded to a square with the mean colour, unless the model's config says else).

    Turned as its EXIF entry says, made RGB (transparent parts white). Encoded images are
    checked here and decoded where they are used; an array's and a PIL image's pixels are read
    there as well, so do not change them in between.

    Args:
      source: the path of an image file, its bytes (PNG, JPEG, WebP, ...), a PIL image, or an
        array uint8 [H, W, 3] (also grey [H, W] or RGBA [H, W, 4]) of values in 0..255.

    Raises: UserError where a file cannot be read or is no image, pixels are more than 64
      million, or an array has another type or shape (floats in 0..1 among them).
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
            raise UserError(
                f"{self._name}: unreadable image ({error}): replace it by a whole PNG or JPEG file"
            ) from error


class Video(VisualSource):
    """A video in a prompt: frames at a steady rate from its middle, each prepared as an image.

    Args:
      source: the path of a video file, its bytes (MP4, WebM, GIF, ...), an array uint8 [T, H,
        W, 3], or a sequence of frames, each as `Image` takes it.
      fps: frames a second that are read of a file; by default 1, as in training (paper 3.2; 30
        frames at 3 fps at inference). Frames have no clock: give them at the rate you want.
      frames: the most that are shown, from the middle; by default as many as the model was
        trained with. The times of more are interpolated (paper 3.2).

    Raises: UserError where a file cannot be read or is no video, a frame's type or shape is
      wrong, or frames are given with `fps`.
    """

    def __init__(self, source: VideoSource, *, fps: float | None = None, frames: int | None = None):
        super().__init__()
        self._most = frames
        self._fps = TRAINED_FPS if fps is None else fps
        self._name = "a video"
        self._source: pathlib.Path | bytes | list[Image]
        if frames is not None and frames < 1:
            raise UserError(f"fj.Video was asked for {frames} frames: ask for 1 or more")
        if not 1e-3 <= self._fps <= 1e3:
            raise UserError(f"fj.Video was asked for {fps} frames a second: ask for 0.001 to 1000")
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
        from flamingo_jax.processing.video import middle_clip, read_frames

        most = self._most or frames
        if isinstance(self._source, list):
            kept = middle_clip(len(self._source), most)
            return np.concatenate([self._source[n].visual(vision, 1).frames for n in kept])
        # Resized as they are read, so that a long video of large frames needs little memory.
        size, how = vision.image_size, vision.image_fit
        found = self._with_file(
            lambda path: read_frames(
                path, fps=self._fps, resize=lambda frame: images.fit(frame, size, how)
            )
        )
        kept = middle_clip(len(found), most)
        return np.stack([images.pad(found[n], size, vision.mean) for n in kept])

    def _with_file(self, use: Callable[[pathlib.Path], Any]) -> Any:
        """Calls `use` with the video's file, which bytes are written to for as long."""
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


def read_visual(encoded: Sequence[bytes], vision: VisionConfig, name: str) -> Visual:
    """Decodes images as one visual at the model's size.

    Raises: UserError with `name` where one cannot be read.
    """
    try:
        frames = [
            images.load(data, vision.image_size, vision.mean, vision.image_fit) for data in encoded
        ]
    except images.ImageError as error:
        raise UserError(
            f"{name}: unreadable image ({error}): replace it by a whole PNG or JPEG file"
        ) from error
    if not frames:
        raise UserError(f"{name} has no image: leave it out")
    return Visual(np.stack(frames))


def _frames_of(source: Any) -> list[Image]:
    if not isinstance(source, (list, tuple)):
        source = _pixels(source, "fj.Video", ndims=(4,))
    if not len(source):
        raise UserError("fj.Video was given no frames: give one or more")
    return [frame if isinstance(frame, Image) else Image(frame) for frame in source]


def _pixels(source: Any, name: str, ndims: Sequence[int]) -> np.ndarray:
    """A source as an array of pixels, or a UserError that says what it should be."""
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
    """Opens a video, so that what is none is told where it is given. Raises VideoError."""
    from flamingo_jax.processing.video_file import opened

    with opened(path):
        pass
