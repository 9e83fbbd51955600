"""Video files to frames, and clips out of frames (paper 3.2: 8 frames at 1 fps in training, 30
at 3 fps at inference).
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import av
import av.container
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import Interpolation

from flamingo_jax.processing.images import MAX_PIXELS
from flamingo_jax.processing.video_clock import FrameClock
from flamingo_jax.processing.video_file import (
    BROKEN,
    DAMAGED,
    VideoError,
    claimed,
    decoded_frames,
    opened,
)
from flamingo_jax.storage import LASTING, read_with_retries

MAX_FRAMES = 3_600
"""One hour at 1 fps."""
CLOCK = 5e-4
"""Seconds by which time stamps may be off through rounding to the container's clock."""
UNSURE = 1.0
"""Seconds by which a header may be wrong about a film's length."""
TRUSTED = ("gif", "apng")
"""Forms that state how long each frame stays, and no clock."""
MAX_STRETCH = 8
"""Pixels more oblong than this are taken for a mistake in the file."""
GAP = "gap in a video of a steady rate"
TOO_MANY_PIXELS = "too many pixels"


@dataclasses.dataclass(frozen=True)
class SampledVideo:
    """What was read of a video. frames: uint8 [H, W, 3], upright RGB. lost: for each frame or
    part of the file that could not be read, the reason."""

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
    """Reads the frames on screen at 0, 1/fps, 2/fps, ... seconds, at most `max_frames`, and
    what was lost on the way: damage is passed over, so that the frame before it stays on
    screen.

    Any form of `video_file.FORMATS`, moving GIFs among them. Pixels that are not square are
    made so, and frames are turned and mirrored as the file says. Where time stamps lack or
    jump, the file's rate takes their place (`video_clock`). `resize` is called on every frame
    as it is read, so that a long video of large frames needs little memory. Raises VideoError
    where no frame can be read or frames have more than `max_pixels`; StorageError where the
    storage fails for long.
    """
    film = read_with_retries(
        lambda: _film(path, fps, resize, max_frames, max_pixels), path, LASTING
    )
    if film.lost:
        logging.warning("%s is damaged: %s", path, ", ".join(dict.fromkeys(film.lost)))
    return film


def _film(
    path: str | pathlib.Path,
    fps: float,
    resize: Callable[[np.ndarray], np.ndarray],
    max_frames: int,
    max_pixels: int,
) -> SampledVideo:
    """What `read_video` reads. Raises OSError where the storage fails for a moment."""
    frames: list[np.ndarray] = []
    lost: list[str] = []
    try:
        with opened(path) as (container, stream):
            _check(path, stream, max_pixels)
            for frame, end in _shown(container, stream, lost):
                _check(path, frame, max_pixels)  # Sizes may change within a film.
                pixels = None
                while len(frames) < max_frames and len(frames) / fps < end - CLOCK:
                    if pixels is None:
                        pixels = resize(_upright(frame, stream, max_pixels))
                    frames.append(pixels)
                if len(frames) == max_frames:
                    break
    except (av.FFmpegError, OSError) as error:
        if not isinstance(error, av.FFmpegError) and error.errno not in (None, *LASTING):
            raise
        if not frames:
            raise VideoError(f"{path} is not a readable video: {error}") from error
        lost.append(BROKEN)
    if not frames:
        raise VideoError(f"{path} is not a readable video: it has no frames")
    return SampledVideo(frames, tuple(lost))


def read_frames(
    path: str | pathlib.Path,
    *,
    fps: float,
    resize: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> list[np.ndarray]:
    """Reads the frames of `read_video`."""
    film = read_video(path, fps=fps, resize=resize, max_frames=max_frames, max_pixels=max_pixels)
    return film.frames


def clip(count: int, frames: int, below: Callable[[int], int] | None = None) -> range:
    """Chooses which of `count` stored frames a clip of `frames` takes: a run of neighbours,
    the first ones where `below`, which draws one of 0..n - 1, is None.
    """
    if below is None or count <= frames:
        return range(min(count, frames))
    start = below(count - frames + 1)
    return range(start, start + frames)


def middle_clip(count: int, frames: int, *, every: float = 1.0) -> list[int]:
    """Chooses which of `count` stored frames a prompt shows: at most `frames`, at one rate,
    from the middle.

    A model has met neighbours at the rate of its training data: frames spread over a long video
    would show it motion of another speed. The paper's 30 frames at 3 fps (facts 6) are asked
    for with a higher rate and number. The middle shows what a video is about more often than
    its beginning does; the paper does not say.

    Args:
      every: stored frames from one that is taken to the next, 1 or more: the stored rate over
        the wanted one.
    """
    taken = min(frames, 1 + int((count - 1) / every + 1e-6))
    start = (count - 1 - (taken - 1) * every) / 2
    return [math.floor(start + place * every + 0.5) for place in range(taken)]


def _shown(
    container: av.container.InputContainer, stream: av.VideoStream, lost: list[str]
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Every frame with the second, counted from the first frame, at which it leaves the screen."""
    rates = float(stream.guessed_rate or 0), float(stream.average_rate or 0)
    clock = FrameClock(*rates, trusted=container.format.name in TRUSTED)
    last: av.VideoFrame | None = None
    for frame in decoded_frames(container, stream, lost):
        time = clock(frame.time, _seconds(last) if last is not None else None)
        if last is not None:
            yield last, time
        last = frame
    if last is None:
        return
    end = clock.last(_seconds(last))
    lost += [GAP] * (clock.gaps - lost.count(DAMAGED))  # What is damaged leaves a gap, too.
    if BROKEN not in lost and max(end, clock.stamp) + UNSURE < claimed(container, stream):
        lost.append(BROKEN)
    yield last, end


def _check(
    path: str | pathlib.Path, sized: av.VideoStream | av.VideoFrame, max_pixels: int
) -> None:
    if sized.width * sized.height > max_pixels:
        text = f"{path}: {sized.width} x {sized.height} pixels are more than {max_pixels}"
        raise VideoError(text, TOO_MANY_PIXELS)


def _seconds(frame: av.VideoFrame) -> float | None:
    """How long a frame stays, by the file."""
    if not frame.duration or not frame.time_base:
        return None
    return float(frame.duration * frame.time_base)


def _upright(frame: av.VideoFrame, stream: av.VideoStream, max_pixels: int) -> np.ndarray:
    """uint8 [H, W, 3] as a player shows it: of square pixels, turned and mirrored."""
    width, height = frame.width, frame.height
    aspect = float(stream.sample_aspect_ratio or 1)
    if aspect != 1 and 1 / MAX_STRETCH <= aspect <= MAX_STRETCH:
        if aspect > 1:
            wide, tall = round(width * aspect), height
        else:
            wide, tall = width, round(height / aspect)
        if wide * tall > max_pixels:  # The longer side shrinks instead.
            wide, tall = max(1, round(wide / aspect)), max(1, round(tall / aspect))
        width, height = wide, tall
    pixels = frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation=Interpolation.BICUBIC
    )
    return np.ascontiguousarray(_turned(pixels, _matrix(frame)))


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """FFmpeg's display matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    sides: Any = frame.side_data  # Its stubs speak of texts.
    data = sides.get(Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    return a, b, c, d


def _turned(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """By quarter turns and mirrors, which are all that [H, W, 3] needs no new pixels for."""
    a, b, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    if a < 0:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if d < 0 else pixels
