"""Small films that tests write."""

import pathlib
import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import av
import av.stream
import numpy as np

RED, GREEN, BLUE, GREY = (250, 0, 0), (0, 250, 0), (0, 0, 250), (128, 128, 128)
UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
SIZE = (64, 96)
"""Height and width of films of four quarters."""


def write(
    path: pathlib.Path,
    shown: Iterable[int | np.ndarray],
    *,
    rate: int,
    codec: str = "libx264",
    form: str | None = None,
    stamp: Callable[[int], int] | None = None,
    aspect: Fraction | None = None,
    matrix: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    size: int = 64,
) -> None:
    """Each frame is grey of a level, of size x size, or uint8 [H, W, 3]. stamp: frame i's time
    in 1/rate s.
    matrix: an .mp4's or .mov's display matrix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [
        np.full((size, size, 3), one, np.uint8) if isinstance(one, int) else one for one in shown
    ]
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if stamp:
                frame.pts, frame.time_base = stamp(number), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if matrix:  # Not every PyAV writes it.
        data = path.read_bytes()
        place = data.index(struct.pack(">9i", *UPRIGHT), data.index(b"tkhd"))
        path.write_bytes(data[:place] + struct.pack(">9i", *matrix) + data[place + 36 :])


def write_two(path: pathlib.Path, still: np.ndarray, film: Sequence[int], *, cover: bool) -> None:
    """A file whose first stream is a still, marked as a cover or not, before a film at 10 fps."""
    with av.open(str(path), "w") as container:
        streams = [
            container.add_stream("mjpeg", rate=1),
            container.add_stream("mpeg4", rate=10),
        ]
        frames = [[still], [np.full((64, 96, 3), level, np.uint8) for level in film]]
        for stream, shown in zip(streams, frames, strict=True):
            stream.height, stream.width = shown[0].shape[:2]
            stream.pix_fmt = "yuvj420p" if stream is streams[0] else "yuv420p"
        if cover:
            streams[0].disposition = av.stream.Disposition.attached_pic.value
        for stream, shown in zip(streams, frames, strict=True):
            for frame in shown:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))


def quarters() -> np.ndarray:
    """Red, green / blue, grey."""
    frame = np.empty((*SIZE, 3), np.uint8)
    height, width = SIZE[0] // 2, SIZE[1] // 2
    frame[:height, :width], frame[:height, width:] = RED, GREEN
    frame[height:, :width], frame[height:, width:] = BLUE, GREY
    return frame


def levels(frames: Iterable[np.ndarray]) -> list[int]:
    return [int(frame.mean().round()) for frame in frames]
