"""Video files to frames, and clips out of frames (paper 3.2: 8 frames at 1 fps in training, 30 at 3 fps at inference)."""

import logging
import pathlib
from collections.abc import Callable, Iterator

import av
import av.container
import numpy as np

from flamingo_jax.processing.images import MAX_PIXELS

MAX_FRAMES = 3_600
"""One hour at 1 fps."""
CLOCK = 5e-4
"""Seconds by which time stamps may be off through rounding to the container's clock."""


class VideoError(ValueError):
    """A video that cannot be read."""


def read_frames(
    path: str | pathlib.Path,
    *,
    fps: float,
    resize: Callable[[np.ndarray], np.ndarray] = lambda frame: frame,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> list[np.ndarray]:
    """The pictures on screen at 0, 1/fps, 2/fps, ... seconds: at most `max_frames` of uint8 [H, W, 3], upright RGB.

    Any file that FFmpeg reads, moving GIFs among them. One that breaks off gives the frames before the break. `resize` is called
    on every frame as it is read, so that a long video of large frames needs little memory.
    Raises VideoError where no frame can be read or frames have more than `max_pixels`.
    """
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no pictures in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(f"{path}: there is no decoder for its pictures")
            if stream.width * stream.height > max_pixels:
                raise VideoError(f"{path}: {stream.width} x {stream.height} pixels are more than {max_pixels}")
            for frame, end in _shown(container, stream):
                pixels = None
                while len(frames) < max_frames and len(frames) / fps < end - CLOCK:
                    if pixels is None:
                        pixels = resize(_upright(frame))
                    frames.append(pixels)
                if len(frames) == max_frames:
                    break
    except (av.FFmpegError, OSError) as error:
        if not frames:
            raise VideoError(f"{path} is not a readable video: {error}") from error
        logging.warning("%s breaks off after %d frames: %s", path, len(frames), error)
    if not frames:
        raise VideoError(f"{path} is not a readable video: it has no frames")
    return frames


def clip(count: int, frames: int, below: Callable[[int], int] | None = None) -> range:
    """Which of `count` stored frames a clip of `frames` takes: a run of neighbours, the first ones where `below`, which draws one of
    0..n - 1, is None."""
    if below is None or count <= frames:
        return range(min(count, frames))
    start = below(count - frames + 1)
    return range(start, start + frames)


def spread(count: int, frames: int) -> list[int]:
    """At most `frames` of `count` frames, evenly over the whole of it: for videos longer than a prompt has room for."""
    return [int(i) for i in np.linspace(0, count - 1, min(count, frames)).round()]


def _shown(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[tuple[av.VideoFrame, float]]:
    """Every frame with the second, counted from the first frame, at which it leaves the screen."""
    stream.thread_type = "AUTO"
    last: av.VideoFrame | None = None
    began = 0.0
    broken: Exception | None = None
    try:
        for frame in container.decode(stream):
            time = frame.time or 0.0
            if last is None:
                began = time
            else:
                yield last, time - began
            last = frame
    except av.FFmpegError as error:
        broken = error
    if last is not None:
        seconds = float(last.duration * last.time_base) if last.duration and last.time_base else 0.0
        yield last, (last.time or 0.0) - began + max(seconds, 2 * CLOCK)
    if broken is not None:
        raise broken


def _upright(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
