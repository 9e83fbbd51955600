"""A video file as the frames in it: what is opened, which stream is the film, what is lost."""

import contextlib
import errno
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
"""FFmpeg's names of the containers and bare streams that hold all of a film in the file itself.

Playlists and descriptions (hls, dash, concat, sdp, imf, vobsub, ...) name other files or hosts,
and are not opened; nor are devices, subtitles and single frames.
"""
OPTIONS = {
    "format_whitelist": FORMATS,
    "protocol_whitelist": "none",
    "enable_drefs": "0",
    "use_absolute_path": "0",
}
"""The file is handed over open, so that FFmpeg needs no protocol at all; the last two are for
.mov files, which may name others that hold their frames.
"""
HEADED = ("mov", "matroska", "avi")
"""Forms whose length is read from a header; FFmpeg guesses that of others."""
BUFFER = 1 << 18
"""Bytes read at once."""
METADATA: dict[str, Any] = {}
"""How titles that are no UTF-8 are read.

Before PyAV 19 they stopped a film from being opened.
"""
if int(av.__version__.split(".")[0]) < 19:
    METADATA["metadata_errors"] = "replace"
COVERS = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
PROBED = 1_000
"""Packets looked at to tell a film from a still, where a file has several streams of frames.
"""
FAILURES = 100
"""Failed reads in a row after which a file has broken off."""

UNREADABLE = "unreadable"
FOREIGN = "not a video, or one that names other files"
NO_MOVING_IMAGES = "file without moving images"
NO_DECODER = "video that no decoder is known for"
DAMAGED = "damaged frame of a video"
BROKEN = "rest of a video that breaks off"


class VideoError(ValueError):
    """A video that cannot be read. reason: why, in words that do not name the file."""

    def __init__(self, message: str, reason: str = UNREADABLE):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def opened(
    path: str | pathlib.Path,
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its film: the stream that moves, not a cover or a still beside it.

    Nothing but the file itself is read, whatever it says. Raises VideoError, OSError.
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
        index = _film(container, known)
    with _container(path) as container:  # Not every form can be wound back.
        stream = container.streams[index]
        assert isinstance(stream, av.VideoStream)
        yield container, stream


@contextlib.contextmanager
def _container(path: str | pathlib.Path) -> Iterator[av.container.InputContainer]:
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
            if error.errno != errno.EINVAL:  # What FFmpeg says of a form that is not in the list.
                raise
            text = f"{path} is not a readable video: its form is not known, or names other files"
            raise VideoError(text, FOREIGN) from error
        assert isinstance(container, av.container.InputContainer)
        with container:
            yield container


def _nothing_else(url: str, flags: int, options: dict[str, Any]) -> Any:
    raise PermissionError(f"{url} is not opened: a video is read from its own file alone")


def _film(container: av.container.InputContainer, streams: list[av.VideoStream]) -> int:
    """Of several streams with frames, the index of the one to watch.

    A still has one packet; of those that move, the file's default, then the largest.
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
    container: av.container.InputContainer, stream: av.VideoStream, lost: list[str]
) -> Iterator[av.VideoFrame]:
    """Yields the stream's frames in the order in which they are shown.

    What is damaged is passed over: `lost` gets DAMAGED for each frame, and BROKEN where the
    file ends before its time.
    """
    # Frame threads report an error at another frame, and lose what they hold beside it.
    stream.thread_type = "SLICE"
    for packet in _packets(container, stream, lost):
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


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, lost: list[str]
) -> Iterator[av.Packet]:
    """All that can be read, and the empty one at the end that flushes the decoder."""
    failures = 0
    packets = container.demux(stream)
    while failures < FAILURES:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            failures += 1
            packets = container.demux(stream)
            continue
        flush = packet.size == 0 and packet.dts is None
        if failures:
            lost += [BROKEN] if flush else [DAMAGED] * failures
            failures = 0
        if packet.size or flush:  # Empty ones in between stand for a frame that did not change.
            yield packet
    lost.append(BROKEN)


def claimed(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Reads the seconds that a film has by the file's header; 0 where that does not say."""
    if container.format.name.split(",")[0] not in HEADED:
        return 0.0
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration:
        return container.duration / av.time_base
    return 0.0
