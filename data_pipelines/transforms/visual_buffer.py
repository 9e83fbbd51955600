"""Where the visuals of a batch are put: every image straight to its place, as soon as it is
read, by whichever thread.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.transforms.augmentation import Augmentation
from data_pipelines.transforms.buffers import Buffer, BufferPool
from data_pipelines.transforms.examples import Arrays, Segment
from flamingo_jax.processing.images import ImageError, pad
from flamingo_jax.processing.jitter import FIELDS


class FrameFormat(NamedTuple):
    """What a visual's frames become: `name` of the array, a blank frame, and how what was read
    is put on it.
    """

    name: str
    blank: np.ndarray
    put: Callable[[np.ndarray, np.ndarray], object]
    """(what was read, frame to write to)"""


def image_format(size: int, mean: Sequence[float]) -> FrameFormat:
    """Describes frames as images uint8 [size, size, 3]; blanks are zero."""
    return FrameFormat(
        "images",
        np.zeros((size, size, 3), np.uint8),
        lambda pixels, frame: pad(pixels, size, mean, out=frame),
    )


def feature_format(shape: tuple[int, int], dtype: np.dtype) -> FrameFormat:
    """Describes frames as an encoder's features [S, C]; blanks are zero."""
    return FrameFormat(
        "features", np.zeros(shape, dtype), lambda features, frame: np.copyto(frame, features)
    )


@dataclasses.dataclass(frozen=True)
class VisualBuffer:
    """A batch's M visuals of T frames. Each place is written by one thread, and different ones
    by any at once.

    written: bool [M, T], the frames that were put. lost: bool [M], the visuals of which a frame
    could not be read. jitter: float32 [M, T, 6], the `FIELDS` of each frame
    (`flamingo_jax.processing.jitter`), where colours are jittered.
    """

    canvas: FrameFormat
    blank: Buffer
    written: np.ndarray
    lost: np.ndarray
    jitter: np.ndarray | None

    @classmethod
    def make(
        cls, canvas: FrameFormat, blanks: BufferPool, visuals: int, frames: int, jitters: bool
    ) -> "VisualBuffer":
        blank = blanks.take((visuals, frames, *canvas.blank.shape), canvas.blank.dtype, leading=2)
        jitter = np.zeros((visuals, frames, len(FIELDS)), np.float32) if jitters else None
        return cls(
            canvas, blank, np.zeros((visuals, frames), bool), np.zeros(visuals, bool), jitter
        )

    def put(
        self, place: int, frame: int, pixels: np.ndarray, augmentation: Augmentation | None
    ) -> None:
        """One frame of the visual in a place, as it was read."""
        if augmentation is not None and augmentation.flip:
            pixels = pixels[:, ::-1]
        if self.jitter is not None and augmentation is not None and augmentation.colour is not None:
            self.jitter[place, frame] = *augmentation.colour, *pixels.shape[:2]
        self.written[place, frame] = True
        self.canvas.put(pixels, self.blank.array[place, frame])

    def finish(self, blanks: BufferPool) -> Arrays:
        """The visuals, zero where there is none or one of its frames was lost; frame_mask bool
        [M, T], True where there is a frame; jitter.
        """
        mask = self.written & ~self.lost[:, None]
        arrays = {
            self.canvas.name: blanks.finish(self.blank, self.written, mask),
            "frame_mask": mask,
        }
        if self.jitter is not None:
            self.jitter[~mask] = 0
            arrays["jitter"] = self.jitter
        return arrays


def schedule_reads(
    segments: Sequence[Segment],
    readers: Sequence[Callable[[int, int], np.ndarray]],
    failed: Callable[[int, ImageError], None],
    buffer: VisualBuffer,
    places: Sequence[int | None],
    add: Callable[[Callable[[], None]], None],
) -> list[bool]:
    """Adds the reading of each frame of a row's visuals, which puts it in the buffer, as work of
    its own; the visuals stand in `places` [N], one after the other, where None stands for those
    that another process reads.

    readers: of each segment, what reads frame f of visual v of its record. A visual that cannot
    be read is reported by its segment's place to `failed` and left blank; nothing else of the
    row changes, or processes that read the same row would not hold the same one.

    Returns: whether each segment is read here, by its visuals or those it shares, or if it has
      none by the place where they would stand.
    """

    def read(
        number: int,
        place: int,
        frame: int,
        stored: tuple[int, int],
        augmentation: Augmentation | None,
    ) -> None:
        if buffer.lost[place]:
            return
        try:
            pixels = readers[number](*stored)
        except ImageError as error:
            buffer.lost[place] = True
            failed(number, error)
        else:
            buffer.put(place, frame, pixels, augmentation)

    here: list[bool] = []
    start = 0
    for number, segment in enumerate(segments):
        if segment.shares:
            here.append(here[-1])
            continue
        standing = places[start : start + len(segment.visuals)]
        here.append(
            any(place is not None for place in standing or places[start : start + 1] or places[-1:])
        )
        start += len(segment.visuals)
        for place, visual, augmentation in zip(
            standing,
            segment.visuals,
            segment.augment or [None] * len(segment.visuals),
            strict=True,
        ):
            if place is None:
                continue
            if not visual:
                failed(number, ImageError("there are no frames"))
            for frame, stored in enumerate(visual):
                add(functools.partial(read, number, place, frame, stored, augmentation))
    return here
