"""Finds the images and clips of a benchmark in a folder, which is listed once."""

import functools
import os
import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.media import ClipFile, ImageFile

VIDEO_ENDINGS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".gif")


class MediaFolder:
    """A folder of images or videos.

    nested: whether its videos lie in folders of it, with names that are in one of them alone.

    Raises: UserError where it is not there.
    """

    def __init__(self, path: pathlib.Path, *, nested: bool = False):
        self.path, self._nested = path, nested
        if not path.is_dir():
            raise UserError(f"there is no folder {path} of images or videos: name its parent")

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """Returns the names of the folder's files."""
        with os.scandir(self.path) as entries:
            return frozenset(entry.name for entry in entries)

    @functools.cached_property
    def _by_stem(self) -> dict[str, str]:
        names = list(self.names)
        if self._nested:
            folders = [name for name in names if (self.path / name).is_dir()]
            names += [f"{one}/{name}" for one in folders for name in os.listdir(self.path / one)]
        found = sorted(name for name in names if name.lower().endswith(VIDEO_ENDINGS))
        return {os.path.splitext(os.path.basename(name))[0]: name for name in found}

    def image(self, name: str) -> ImageFile:
        """Returns the image of this file name; its file may be missing."""
        return ImageFile(self.path / plain_name(name), name in self.names)

    def clip(self, stem: str, start: float | None = None, end: float | None = None) -> ClipFile:
        """Returns the video of this name without its ending, or seconds of it; its file may be
        missing.
        """
        name = self._by_stem.get(stem)
        path = self.path / (name or f"{plain_name(stem)}.mp4")
        return ClipFile(path, start, end, name is not None)


def plain_name(name: str) -> str:
    """Returns a file name that stays in its folder; raises UserError for any other."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(f"{name!r} is no name of a file: annotations may not name other folders")
    return name
