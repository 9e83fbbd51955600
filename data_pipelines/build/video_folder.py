"""Source `video_folder`: converts a folder of videos and a captions.jsonl to video-text pairs,
frames stored as JPEG (paper 3.2: 1 frame per second).

`captions.jsonl` or `videos.jsonl` has one line per video, `{"video": "any/where/below.mp4",
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
    """Reads videos with captions, one record per video; see `CaptionedFolder`.

    fps: frames per second to store.
    max_seconds: use only this much from the beginning of longer videos.
    short_side: shrink frames to this shorter side, in pixels; 0 keeps their size.
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
    """Files with these suffixes and without a line are counted as dropped. A file with a line
    may have any suffix.
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
    """Samples a video's frames and encodes them as JPEG; the arguments are VideoFolder's.

    Returns: (frames, the reason for each frame or part that could not be read).
    Raises: Unusable with the reason where there are no frames.
    """
    try:
        most = max(1, math.ceil(max_seconds * fps))
        film = read_video(
            file, fps=fps, max_frames=most, resize=lambda frame: shrink(frame, short_side)
        )
    except VideoError as error:
        raise Unusable(error.reason) from error
    return [encode(frame, "JPEG", FRAME_QUALITY) for frame in film.frames], film.lost
