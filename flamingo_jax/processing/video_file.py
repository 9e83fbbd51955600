"""Opens video files with PyAV, safely: chooses the video stream and decodes its frames past
damage.
"""

import contextlib
import errno
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any

import av
import av.container
import av.stream

FORMATS = (
    "mov,mp4,matroska,webm,avi,gif,apng,mpeg,mpegts,mpegvideo,m4v,h261,h263,h264,hevc,vvc,evc,av1,"
    "obu,ivf,vc1,dirac,cavsvideo,avs2,avs3,flv,asf,ogg,nut,yuv4mpegpipe,mjpeg,mjpeg_2000,mxf,gxf,"
    "rm,dv,swf,nsv,wtv,nuv,roq,smk,bink,flic,jpegxl_anim,webp_anim"
)
"""FFmpeg's names of the containers and raw streams that are self-contained.

Not allowed are playlists and descriptions (hls, dash, concat, sdp, imf, vobsub, ...), which
name other files or hosts that FFmpeg would open, and devices, subtitles and single images.
"""
OPTIONS = {
    "format_whitelist": FORMATS,
    "protocol_whitelist": "none",
    "enable_drefs": "0",
    "use_absolute_path": "0",
}
"""Security options. The file is passed as an open file, so FFmpeg needs no protocol; the last
two are for .mov files, which may reference other files.
"""
HEADED = ("mov", "matroska", "avi")
"""Formats with their duration in a header; for others FFmpeg estimates it."""
BUFFER = 1 << 18
"""Bytes per read."""
METADATA: dict[str, Any] = {}
"""Options for metadata, such as titles, that is not UTF-8; PyAV before 19 fails on it by
default.
"""
if int(av.__version__.split(".")[0]) < 19:
    METADATA["metadata_errors"] = "replace"
COVERS = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
PROBED = 1_000
"""Packets to read to tell videos from still images, in a file with several video streams."""
FAILURES = 100
"""Consecutive failed reads after which the rest of a file counts as lost."""

UNREADABLE = "unreadable"
FOREIGN = "not a video, or one that names other files"
NO_MOVING_IMAGES = "file without moving images"
NO_DECODER = "video that no decoder is known for"
DAMAGED = "damaged frame of a video"
BROKEN = "rest of a video that breaks off"


class VideoError(ValueError):
    """Raised for a video that cannot be read.

    reason: why, without the file's name, so that failures can be counted by reason.
    """

    def __init__(self, message: str, reason: str = UNREADABLE):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def opened(
    path: str | pathlib.Path,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video file and chooses its video stream, not a cover or a still image beside it.

    No other file is read, even if this one references it.

    Raises: VideoError where it is not a readable video; OSError where it cannot be opened.
    """
    with _container(path) as container:
        films = [s for s in container.streams.video if not s.disposition & COVERS]
        known = [stream for stream in films if stream.codec_context is not None]
        if not any(stream.type in ("video", "audio") for stream in container.streams):
            raise VideoError(f"{path} is not a readable video: there is nothing to play in it")
        if not films:
            raise VideoError(f"{path} has no moving images in it", NO_MOVING_IMAGES)
        if not known:
            raise VideoError(f"{path}: there is no decoder for its frames", NO_DECODER)
        if len(known) == 1:
            yield container, known[0]
            return
        index = _choose_stream(container, known)
    # `_choose_stream` has read packets, and not every format can seek back: open the file again.
    with _container(path) as container:
        stream = container.streams[index]
        assert isinstance(stream, av.VideoStream)
        yield container, stream


@contextlib.contextmanager
def _container(path: str | pathlib.Path) -> Iterator[av.container.InputContainer]:
    """Opens a file with FFmpeg, restricted to `FORMATS`."""
    with open(path, "rb") as file:
        try:
            container = av.open(
                file,
                container_options=dict(OPTIONS),
                buffer_size=BUFFER,
                io_open=_nothing_else,
                **METADATA,
            )
        except av.FFmpegError as error:
            # EINVAL is FFmpeg's error for a format that is not in the whitelist.
            if error.errno != errno.EINVAL:
                raise
            text = f"{path} is not a readable video: its form is not known, or names other files"
            raise VideoError(text, FOREIGN) from error
        assert isinstance(container, av.container.InputContainer)
        with container:
            yield container


def _nothing_else(url: str, flags: int, options: dict[str, Any]) -> Any:
    raise PermissionError(f"{url} is not opened: a video is read from its own file alone")


def _choose_stream(container: av.container.InputContainer, streams: list[av.VideoStream]) -> int:
    """Chooses among several video streams and returns its index.

    Streams with more than one packet come first (a still image has one), then the file's
    default stream, then the largest.
    """
    packets = dict.fromkeys((stream.index for stream in streams), 0)
    with contextlib.suppress(av.FFmpegError):
        for number, packet in enumerate(container.demux(streams)):
            packets[packet.stream.index] += packet.size > 0
            if number == PROBED or all(count > 1 for count in packets.values()):
                break

    def worth(stream: av.VideoStream) -> tuple[bool, bool, int, int]:
        default = bool(stream.disposition & av.stream.Disposition.default)
        moves = packets[stream.index] > 1
        return moves, default, stream.width * stream.height, -stream.index

    return max(streams, key=worth).index


def decoded_frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    lost: list[str],
    skip: int = 0,
) -> Iterator[av.VideoFrame]:
    """Yields the stream's frames in presentation order, skipping damage.

    Args:
      lost: gets DAMAGED for each damaged frame, and BROKEN where the file ends early.
      skip: the number of `packets` that are not decoded: those before a key frame.
    """
    # Slice threading only: with frame threading FFmpeg reports an error at a later frame, and
    # drops intact frames with it.
    stream.thread_type = "SLICE"
    for packet in itertools.islice(packets(container, stream, lost), skip, None):
        try:
            frames = packet.decode()
        except av.EOFError:
            return
        except av.FFmpegError:
            lost.append(DAMAGED)
            continue
        for frame in frames:
            if frame.is_corrupt:
                lost.append(DAMAGED)
            else:
                yield frame


def packets(
    container: av.container.InputContainer, stream: av.VideoStream, lost: list[str]
) -> Iterator[av.Packet]:
    """Yields all readable packets, then the empty packet that flushes the decoder."""
    failures = 0
    read = container.demux(stream)
    while failures < FAILURES:
        try:
            packet = next(read)
        except StopIteration:
            return
        except av.FFmpegError:
            failures += 1
            read = container.demux(stream)
            continue
        flush = packet.size == 0 and packet.dts is None
        if failures:
            lost += [BROKEN] if flush else [DAMAGED] * failures
            failures = 0
        if packet.size or flush:  # Other empty packets mean that the frame did not change.
            yield packet
    lost.append(BROKEN)


def stated_duration(part: av.VideoFrame | av.Packet) -> float | None:
    """Returns the duration of a frame in seconds as the file states it; None where it does
    not.
    """
    if not part.duration or not part.time_base:
        return None
    return float(part.duration * part.time_base)


def declared_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Returns the duration in seconds that the file's header declares; 0 if none."""
    if container.format.name.split(",")[0] not in HEADED:
        return 0.0
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return 0.0
