"""Reads when each frame of a video is shown from its packets, without decoding them, and where
decoding may begin, so that a part of a long video costs no more than its own frames.
"""

import bisect
import copy
import dataclasses
import math
import pathlib
from typing import NamedTuple

import av
import av.container

from flamingo_jax.processing.video_clock import BEHIND, FrameClock
from flamingo_jax.processing.video_file import decoded_frames, opened, packets, stated_duration

TIMED = ("mov", "matroska", "mpegts", "flv")
"""Formats whose packets have the timestamps that their frames get. Others state the order of
decoding alone, or none; in GIFs each frame is drawn over the one before it.
"""
TRUSTED = ("gif", "apng")
"""Formats that store the duration of each frame instead of timestamps."""
RESTARTED = (
    *("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg", "flv1"),
)
"""Codecs that can be decoded from any frame that is marked as a key frame."""


@dataclasses.dataclass(frozen=True)
class KeyFrame:
    """A frame from which a video can be decoded.

    time: in seconds from the first frame.
    packet: its number among the stream's packets, in the file's order.
    stamp: its timestamp in units of the stream.
    clock: as it is before this frame.
    lasted: the duration of the frame before it as the file states it, in seconds.
    """

    time: float
    packet: int
    stamp: int
    clock: FrameClock
    lasted: float | None


@dataclasses.dataclass(frozen=True)
class FrameIndex:
    """When frames are shown, in seconds from the first.

    end: until when the last one that was looked at is shown.
    keys: the key frames but the first, in order.
    """

    end: float
    keys: list[KeyFrame]

    def key_at(self, time: float) -> KeyFrame | None:
        """Returns the last key frame that is shown at a time or before; None for the first."""
        place = bisect.bisect_right(self.keys, time, key=lambda one: one.time)
        return self.keys[place - 1] if place else None


class _Packet(NamedTuple):
    """Of one frame. number: in the file's order. stamp: in units of the stream."""

    number: int
    stamp: int
    time: float
    lasts: float | None
    key: bool


def index_frames(path: str | pathlib.Path, until: float) -> FrameIndex | None:
    """Reads a video's packets up to a time.

    Args:
      until: seconds after which nothing matters.

    Returns: the index; None where only decoding from the beginning tells when frames are shown.
    Raises: VideoError, OSError, or an error of FFmpeg's.
    """
    with opened(path) as (container, stream):
        if container.format.name.split(",")[0] not in TIMED:
            return None
        if stream.codec_context.codec.canonical_name not in RESTARTED:
            return None
        first = next(decoded_frames(container, stream, []), None)
    if first is None or first.pts is None or first.time is None:
        return None
    for limit in (until, math.inf):
        with opened(path) as (container, stream):
            found = _read_packets(container, stream, first.pts, first.time + limit)
            if not found:
                return None
            index = _replay(found, clock_of(container, stream))
        if index.end > until:
            break  # Else timestamps jumped ahead of the clock: read on.
    return index


def clock_of(container: av.container.InputContainer, stream: av.VideoStream) -> FrameClock:
    """Makes the clock of a video's frames."""
    rates = float(stream.guessed_rate or 0), float(stream.average_rate or 0)
    return FrameClock(*rates, trusted=container.format.name in TRUSTED)


def _read_packets(
    container: av.container.InputContainer, stream: av.VideoStream, first: int, until: float
) -> list[_Packet]:
    """Reads packets in the order in which their frames are shown, but those before the first
    frame; [] where the order is not certain.
    """
    found: list[_Packet] = []
    beyond = 0
    for number, packet in enumerate(packets(container, stream, [])):
        if not packet.size or packet.is_discard:
            continue
        if packet.pts is None or packet.time_base is None:
            return []
        if packet.pts < first:
            continue
        time = float(packet.pts * packet.time_base)
        found.append(_Packet(number, packet.pts, time, stated_duration(packet), packet.is_keyframe))
        # Frames are decoded before or after others by BEHIND at most, so that none comes late.
        beyond += time > until
        if beyond > 2 * BEHIND:
            break
    shown = sorted(found, key=lambda one: one.stamp)
    order = {one.number: place for place, one in enumerate(shown)}
    if any(abs(order[one.number] - place) > BEHIND for place, one in enumerate(found)):
        return []  # The clock was set back: two frames may have one timestamp.
    return shown


def _replay(shown: list[_Packet], clock: FrameClock) -> FrameIndex:
    """Runs the clock over the packets' timestamps, as it runs over the frames'."""
    keys = []
    lasted: float | None = None
    for place, one in enumerate(shown):
        before = copy.copy(clock)
        time = clock(one.time, lasted)
        if one.key and place:
            keys.append(KeyFrame(time, one.number, one.stamp, before, lasted))
        lasted = one.lasts
    return FrameIndex(clock.last(lasted), keys)
