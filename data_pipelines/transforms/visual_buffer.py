"""The array of a batch's images, which reader threads fill frame by frame.

Each frame is copied to its place as soon as it is decoded, by any thread, without a lock: no
two frames share a place.
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
    """How frames are stored in a batch.

    name: of the batch's array, "images" or "features".
    blank: an empty frame; gives the shape and dtype.
    put: copies what was read into a frame of the array.
    """

    name: str
    blank: np.ndarray
    put: Callable[[np.ndarray, np.ndarray], object]
    """(what was read, frame to write to)"""


def image_format(size: int, mean: Sequence[float]) -> FrameFormat:
    """Describes frames that are images: uint8 [size, size, 3], padded with the mean colour."""
    return FrameFormat(
        "images",
        np.zeros((size, size, 3), np.uint8),
        lambda pixels, frame: pad(pixels, size, mean, out=frame),
    )


def feature_format(shape: tuple[int, int], dtype: np.dtype) -> FrameFormat:
    """Describes frames that are a frozen encoder's features: [S, C]."""
    return FrameFormat(
        "features", np.zeros(shape, dtype), lambda features, frame: np.copyto(frame, features)
    )


@dataclasses.dataclass(frozen=True)
class VisualBuffer:
    """A batch's M visuals of T frames, filled by several threads, each frame by one.

    canvas: the format of a frame.
    blank: the array that is filled, [M, T, ...].
    written: bool [M, T], the frames that were put.
    lost: bool [M], the visuals of which some frame could not be read.
    jitter: float32 [M, T, 6], the `flamingo_jax.processing.jitter.FIELDS` of each frame; None
      where the batch has no colour jitter.
    """

    frame_format: FrameFormat
    blank: Buffer
    written: np.ndarray
    lost: np.ndarray
    jitter: np.ndarray | None

    @classmethod
    def make(
        cls, frame_format: FrameFormat, pool: BufferPool, visuals: int, frames: int, jitters: bool
    ) -> "VisualBuffer":
        blank = pool.take(
            (visuals, frames, *frame_format.blank.shape), frame_format.blank.dtype, leading=2
        )
        jitter = np.zeros((visuals, frames, len(FIELDS)), np.float32) if jitters else None
        return cls(
            frame_format, blank, np.zeros((visuals, frames), bool), np.zeros(visuals, bool), jitter
        )

    def put(
        self, place: int, frame: int, pixels: np.ndarray, augmentation: Augmentation | None
    ) -> None:
        """Stores one frame of the visual at `place`, flipped if its augmentation says so."""
        if augmentation is not None and augmentation.flip:
            pixels = pixels[:, ::-1]
        if self.jitter is not None and augmentation is not None and augmentation.colour is not None:
            self.jitter[place, frame] = *augmentation.colour, *pixels.shape[:2]
        self.written[place, frame] = True
        self.frame_format.put(pixels, self.blank.array[place, frame])

    def finish(self, pool: BufferPool) -> Arrays:
        """Returns the batch's arrays, after all frames have been put.

        Returns: the visuals ([M, T, ...], zero where there is no frame or one of the visual's
          frames was lost), "frame_mask" (bool [M, T], True where there is a frame) and, where
          colours are jittered, "jitter" (float32 [M, T, 6]).
        """
        mask = self.written & ~self.lost[:, None]
        arrays = {
            self.frame_format.name: pool.finish(self.blank, self.written, mask),
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
    """Adds one task for each frame of a row's visuals; the task reads the frame into the
    buffer.

    A visual that cannot be read is reported to `failed` and left blank. Nothing else of the
    row changes: other processes that read parts of the same row must hold the same tokens.

    Args:
      readers: for each segment, a function (visual, frame) -> pixels of its record.
      failed: called with (segment number, error).
      places: [N], where in the buffer the row's visuals go, one after the other; None for
        those that another process reads.
      add: takes a task for the pool of reader threads.

    Returns: for each segment, whether this process reads it: by its own visuals or those it
      shares; a segment without visuals counts by the place that its first would have.
    """

    def read(
        number: int,
        place: int,
        frame: int,
        stored: tuple[int, int],
        augmentation: Augmentation | None,
    ) -> None:
        if buffer.lost[place]:  # Another frame of this visual has failed already.
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
