"""A folder of videos with a captions JSONL to a dataset of videos, their frames stored as JPEG
(paper 3.2: 1 frame a second).

`captions.jsonl` or `videos.jsonl` has a line per video, `{"video": "any/where/below.mp4",
"captions": ["...", ...]}`.
"""

import dataclasses
import math
import pathlib
from typing import Any, ClassVar

from data_pipelines.build.captioned_folder import CaptionedFolder, Unusable
from data_pipelines.build.images import encode, shrink
from flamingo_jax.processing.video import VideoError, read_video

FRAME_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class VideoFolder(CaptionedFolder):
    """A folder of videos with a caption file. fps: frames a second. max_seconds: only the
    beginning of longer videos is used.
    short_side: larger frames are shrunk to it.
    """

    key: ClassVar[str] = "video"
    caption_files: ClassVar[tuple[str, ...]] = ("captions.jsonl", "videos.jsonl")
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {
            ".mp4",
            ".m4v",
            ".mov",
            ".qt",
            ".webm",
            ".mkv",
            ".avi",
            ".divx",
            ".gif",
            ".mpg",
            ".mpeg",
            ".mpe",
            ".m1v",
            ".m2v",
            ".ts",
            ".mts",
            ".m2ts",
            ".vob",
        }
        | {
            ".ogv",
            ".ogg",
            ".wmv",
            ".asf",
            ".flv",
            ".f4v",
            ".3gp",
            ".3g2",
            ".mj2",
            ".mjpeg",
            ".y4m",
            ".apng",
        }
        | {
            ".h264",
            ".264",
            ".h265",
            ".hevc",
            ".265",
            ".ivf",
            ".nut",
            ".mxf",
            ".dv",
            ".rm",
            ".rmvb",
        }
    )
    """Those that no line names are counted by these; a file that a line names may have any
    ending.
    """

    fps: float = 1.0
    max_seconds: float = 64.0
    short_side: int = 256

    @property
    def kind(self) -> str:
        return "videos"

    @property
    def about(self) -> str:
        return f"Videos with captions, {self.fps:g} frames a second."

    def read(self, file: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
        frames, lost = stored_frames(
            file, fps=self.fps, max_seconds=self.max_seconds, short_side=self.short_side
        )
        return {"frames": frames, "fps": self.fps}, lost


def stored_frames(
    file: pathlib.Path, *, fps: float, max_seconds: float, short_side: int
) -> tuple[list[bytes], tuple[str, ...]]:
    """Reads a video's frames as JPEG files, and the reasons of `read_video` for what is lost
    of it.

    The arguments are VideoFolder's. Raises Unusable.
    """
    try:
        most = max(1, math.ceil(max_seconds * fps))
        film = read_video(
            file, fps=fps, max_frames=most, resize=lambda frame: shrink(frame, short_side)
        )
    except VideoError as error:
        raise Unusable(error.reason) from error
    return [encode(frame, "JPEG", FRAME_QUALITY) for frame in film.frames], film.lost
