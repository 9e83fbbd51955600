"""MSVD-QA (Xu et al. 2017): questions about short videos, scored by exact match.

Models with a closed vocabulary count answers outside it as wrong; generated ones need none.
"""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.benchmarks.one_word_files import FILE, SPLITS, read_one_word_files
from flamingo_jax.evaluation.media import ClipFile
from flamingo_jax.evaluation.prompts import QUESTION
from flamingo_jax.evaluation.scoring import files

MAPPING = "youtube_mapping.txt"


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the questions of a split; a video may have its number or its original name."""
    videos, originals = MediaFolder(folder / "video"), _originals(folder / MAPPING)

    def clip(number: int) -> ClipFile:
        found = videos.clip(f"vid{number}")
        named = originals.get(f"vid{number}", "")
        return found if found.there or not named else videos.clip(named)

    return read_one_word_files(folder, split, clip)


def _originals(place: pathlib.Path) -> dict[str, str]:
    """Reads {"vid1": the video's original name}; {} without the file."""
    if not place.is_file():
        return {}
    names = {}
    for number, line in enumerate(files.read_text(str(place)).splitlines(), 1):
        words = line.split()
        if len(words) not in (0, 2):
            raise UserError(f"{place}, line {number}, must have two words: a name and vid1")
        if words:
            names[words[1]] = words[0]
    return names


MSVDQA = BenchmarkSet(
    name="msvdqa",
    title="MSVD-QA",
    layout={
        FILE.format("{train,val,test}"): "questions and answers",
        "video/": "videos vid1.avi, ..., or with their original names, see the next file",
        MAPPING: "original names of the videos, -4wsuPCjDBc_5_15 vid1, ...; optional",
    },
    kind="generate",
    template=QUESTION,
    scorer="exact",
    read=read,
    splits=SPLITS,
    support="train",
    video=True,
)
