"""Finds the videos of NExT-QA, which are VidOR's."""

import pathlib
from typing import Any

from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder, plain_name
from flamingo_jax.evaluation.media import ClipFile
from flamingo_jax.evaluation.scoring import files

VIDEOS, MAPPING = "NExTVideo", "map_vid_vidorID.json"
"""The mapping is that of the repository doc-doc/NExT-QA, {"4238010028": "1164/4238010028"}."""


class VidorVideos:
    """Finds videos: all in one folder, or in VidOR's folders, which the mapping names."""

    def __init__(self, folder: pathlib.Path):
        self._flat = MediaFolder(folder / VIDEOS)
        self._folders: dict[str, MediaFolder] = {}
        self._place = str(folder / MAPPING)
        self._mapping: dict[str, Any] = {}
        if (folder / MAPPING).is_file():
            self._mapping = files.as_dict(files.read_json(self._place), self._place)

    def clip(self, video: str) -> ClipFile:
        """Returns a video, which may be missing. Raises UserError for a malformed mapping."""
        found = self._flat.clip(video)
        if found.there or video not in self._mapping:
            return found
        mapped = files.field(self._mapping, video, f"{self._place},", str)
        parent, _, stem = mapped.rpartition("/")
        path = self._flat.path / (plain_name(parent) if parent else ".")
        if not path.is_dir():
            return ClipFile(path / f"{plain_name(stem)}.mp4", there=False)
        if parent not in self._folders:
            self._folders[parent] = MediaFolder(path)
        return self._folders[parent].clip(stem)
