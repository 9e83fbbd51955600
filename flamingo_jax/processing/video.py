"""Samples frames from video files at a fixed rate, and chooses clips among frames (paper 3.2:
8 frames at 1 fps in training, 30 frames at 3 fps at inference).
"""

import copy
import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import av.container
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation

from flamingo_jax.processing.images import MAX_PIXELS
from flamingo_jax.processing.video_file import (
    BROKEN,
    DAMAGED,
    VideoError,
    declared_duration,
    decoded_frames,
    opened,
    stated_duration,
)
from flamingo_jax.processing.video_index import KeyFrame, clock_of, index_frames
from flamingo_jax.storage import LASTING, read_with_retries

MAX_FRAMES = 3_600
"""One hour at 1 fps."""
CLOCK = 5e-4
"""Seconds. Tolerance for timestamps rounded to the container's time base."""
UNSURE = 1.0
"""Seconds. Tolerance for the duration that a file's header declares."""
MAX_STRETCH = 8
"""A pixel aspect ratio beyond this is taken for an error in the file and ignored."""
GAP = "gap in a video of a steady rate"
TOO_MANY_PIXELS = "too many pixels"


@dataclasses.dataclass(frozen=True)
class SampledVideo:
    """Frames sampled from a video.

    frames: each uint8 [H, W, 3], upright RGB.
    lost: the reason for each frame or part of the file that could not be decoded.
    """

    frames: list[np.ndarray]
    lost: tuple[str, ...] = ()


def read_video(
    path: str | pathlib.Path,
    *,
    fps: float,
    resize: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> SampledVideo:
    """Reads the frames that a player shows at 0, 1/fps, 2/fps, ... seconds, at most
    `max_frames`.

    Damaged frames are skipped and reported; the frame before them is used instead. Non-square
    pixels are made square, and frames are rotated and mirrored as the file says. Where
    timestamps are missing or jump, the file's frame rate is used instead (`video_clock`).

    Args:
      path: a file in one of `video_file.FORMATS`, animated GIFs included.
      resize: is called on each sampled frame, so that a long video needs little memory.
      max_pixels: width x height of a frame at most.

    Raises:
      VideoError: no frame can be read, or frames have more than `max_pixels`.
      StorageError: the storage kept failing.
    """
    film = read_with_retries(
        lambda: _read_once(path, fps, resize, range(max_frames), max_pixels), path, LASTING
    )
    return _checked(path, film)


def read_middle(
    path: str | pathlib.Path,
    *,
    fps: float,
    frames: int,
    start: float = 0.0,
    end: float | None = None,
    resize: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
    max_pixels: int = MAX_PIXELS,
) -> SampledVideo:
    """Reads the `frames` in the middle (`middle_clip`) of those that `read_video` samples from
    `start` until before `end`, or the nearest one where it samples none there.

    Where the file's packets tell when its frames are shown, decoding begins at the last key frame
    before the first of these frames and ends with the last of them; else the file is decoded
    from its beginning, twice. No other frames are converted or kept in memory.

    Args:
      frames: at most.
      start, end: seconds from the video's first frame; None for the video's end.
      resize, max_pixels: see `read_video`.

    Raises: VideoError, StorageError.
    """
    first = math.ceil(start * fps - 1e-6)
    stop = None if end is None else max(math.ceil(end * fps - 1e-6), first + 1)
    until = math.inf if stop is None else stop / fps

    def wanted(shown_until: float) -> list[int]:
        """Returns the numbers of the frames among those sampled from a video of this length."""
        count = _samples(shown_until, fps)
        if not count:
            return []
        stop_at = count if stop is None else min(stop, count)
        part = range(first, stop_at) or range(count - 1, count)
        return [part[place] for place in middle_clip(len(part), frames)]

    def read() -> SampledVideo:
        index = index_frames(path, until)
        if index is not None and (numbers := wanted(index.end)):
            key = index.key_at(numbers[0] / fps + CLOCK)
            film = _read_once(path, fps, resize, numbers, max_pixels, key)
            if len(film.frames) == len(numbers):
                return film
        numbers = wanted(_decoded_until(path, until, max_pixels))
        return _read_once(path, fps, resize, numbers, max_pixels)

    return _checked(path, read_with_retries(read, path, LASTING))


def _checked(path: str | pathlib.Path, film: SampledVideo) -> SampledVideo:
    """Returns a video that has frames, and logs its damage; raises VideoError."""
    if not film.frames:
        raise VideoError(f"{path} is not a readable video: it has no frames")
    if film.lost:
        logging.warning("%s is damaged: %s", path, ", ".join(dict.fromkeys(film.lost)))
    return film


def _read_once(
    path: str | pathlib.Path,
    fps: float,
    resize: Callable[[np.ndarray], np.ndarray],
    wanted: Sequence[int],
    max_pixels: int,
    key: KeyFrame | None = None,
) -> SampledVideo:
    """Reads the frames at `wanted` / fps seconds, in increasing order, as far as there are such;
    raises OSError for storage errors that may be transient.
    """
    frames: list[np.ndarray] = []
    lost: list[str] = []
    try:
        with opened(path) as (container, stream):
            _check(path, stream, max_pixels)
            for frame, end in _shown(container, stream, lost, key):
                _check(path, frame, max_pixels)  # Sizes may change within a film.
                # A frame that is shown for long is sampled several times, one shown for less
                # than 1/fps perhaps never: then it is not converted to RGB.
                pixels = None
                while len(frames) < len(wanted) and wanted[len(frames)] / fps < end - CLOCK:
                    if pixels is None:
                        pixels = resize(_upright(frame, stream, max_pixels))
                    frames.append(pixels)
                if len(frames) == len(wanted):
                    break
    except (av.FFmpegError, OSError) as error:
        _raise_lasting(path, error, bool(frames))
        lost.append(BROKEN)
    return SampledVideo(frames, tuple(lost))


def _decoded_until(path: str | pathlib.Path, until: float, max_pixels: int) -> float:
    """Decodes a video until it has passed a time; returns until when its frames are shown."""
    end = 0.0
    try:
        with opened(path) as (container, stream):
            _check(path, stream, max_pixels)
            for _, end in _shown(container, stream, []):
                if end > until:
                    break
    except (av.FFmpegError, OSError) as error:
        _raise_lasting(path, error, end > 0)
    return end


def _samples(end: float, fps: float) -> int:
    """Returns how many frames are sampled from a video whose last one is shown until `end`."""
    count = max(0, math.floor(end * fps) - 1)
    while count / fps < end - CLOCK:
        count += 1
    return count


def _raise_lasting(path: str | pathlib.Path, error: Exception, some: bool) -> None:
    """Raises an error of reading a video, unless it comes after some frames.

    Raises: OSError for a failure of the storage; else VideoError.
    """
    of_storage = isinstance(error, OSError) and not isinstance(error, av.FFmpegError)
    if of_storage and error.errno not in (None, *LASTING):  # type: ignore[attr-defined]
        raise error
    if not some:
        raise VideoError(f"{path} is not a readable video: {error}") from error


def read_frames(
    path: str | pathlib.Path,
    *,
    fps: float,
    resize: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> list[np.ndarray]:
    """Reads frames as `read_video` does, and returns the frames alone."""
    film = read_video(path, fps=fps, resize=resize, max_frames=max_frames, max_pixels=max_pixels)
    return film.frames


def clip(count: int, frames: int, below: Callable[[int], int] | None = None) -> range:
    """Chooses a training clip: `frames` consecutive ones of `count` stored frames.

    below: draws a random integer from 0..n - 1 for the start; None takes the first frames.
    """
    if below is None or count <= frames:
        return range(min(count, frames))
    start = below(count - frames + 1)
    return range(start, start + frames)


def middle_clip(count: int, frames: int, *, every: float = 1.0) -> list[int]:
    """Chooses the frames that a prompt shows: at most `frames` of `count` stored ones, equally
    spaced, from the middle of the video.

    They are not spread over the whole video, since the model was trained on frames at a fixed
    rate and would see motion at another speed. The paper does not say which part of a long
    video it takes; the middle shows what a video is about more often than its beginning.

    Args:
      every: the step in stored frames, at least 1: stored rate / wanted rate.

    Returns: indices of frames.
    """
    taken = min(frames, 1 + int((count - 1) / every + 1e-6))
    start = (count - 1 - (taken - 1) * every) / 2
    return [math.floor(start + place * every + 0.5) for place in range(taken)]


def _shown(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    lost: list[str],
    key: KeyFrame | None = None,
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yields each decoded frame with the time, in seconds from the first frame, until which it
    is shown.

    key: where to begin; None for the video's first frame.
    """
    clock = copy.copy(key.clock) if key else clock_of(container, stream)
    lasted = key.lasted if key else None
    last: av.VideoFrame | None = None
    for frame in decoded_frames(container, stream, lost, key.packet if key else 0):
        if key and (frame.pts is None or frame.pts < key.stamp):
            continue  # It is shown before the key frame, and needs frames that were not decoded.
        time = clock(frame.time, lasted)
        lasted = stated_duration(frame)
        if last is not None:
            yield last, time
        last = frame
    if last is None:
        return
    end = clock.last(lasted)
    # A damaged frame leaves a gap in the timestamps, too: do not count it twice.
    lost += [GAP] * (clock.gaps - lost.count(DAMAGED))
    if BROKEN not in lost and max(end, clock.stamp) + UNSURE < declared_duration(container, stream):
        lost.append(BROKEN)
    yield last, end


def _check(
    path: str | pathlib.Path, sized: av.VideoStream | av.VideoFrame, max_pixels: int
) -> None:
    """Raises VideoError where frames have more than `max_pixels`."""
    if sized.width * sized.height > max_pixels:
        text = f"{path}: {sized.width} x {sized.height} pixels are more than {max_pixels}"
        raise VideoError(text, TOO_MANY_PIXELS)


def _upright(frame: av.VideoFrame, stream: av.VideoStream, max_pixels: int) -> np.ndarray:
    """Converts a frame to uint8 [H, W, 3] with square pixels, rotated and mirrored as a player
    shows it.
    """
    width, height = frame.width, frame.height
    aspect = float(stream.sample_aspect_ratio or 1)
    if aspect != 1 and 1 / MAX_STRETCH <= aspect <= MAX_STRETCH:
        if aspect > 1:
            wide, tall = round(width * aspect), height
        else:
            wide, tall = width, round(height / aspect)
        # Stretch the shorter side; if that makes too many pixels, shrink the longer one
        # instead.
        if wide * tall > max_pixels:
            wide, tall = max(1, round(wide / aspect)), max(1, round(tall / aspect))
        width, height = wide, tall
    pixels = frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation=Interpolation.BICUBIC
    )
    return np.ascontiguousarray(_turned(pixels, _matrix(frame)))


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Reads FFmpeg's display matrix (a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b
    x + d y).
    """
    sides: Any = frame.side_data  # PyAV's type stubs allow only strings as keys.
    data = sides.get(Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    return a, b, c, d


def _turned(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Applies the nearest rotation by a multiple of 90 degrees and mirroring, without
    resampling.
    """
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if d < 0 else pixels
