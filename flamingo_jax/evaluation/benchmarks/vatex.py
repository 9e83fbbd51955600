"""VATEX: English captions of clips of ten seconds (Wang et al. 2019)."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ClipFile
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files

SPLITS = {
    "test": "vatex_public_test_english_v1.1.json",
    "val": "vatex_validation_v1.0.json",
    "train": "vatex_training_v1.0.json",
}
"""Split -> file. The captions of the private test split are kept by the authors."""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the owners' file: [{"videoID", "enCap": [10 captions]}]. All ten are references; the
    last five are parallel to Chinese ones, so that shots have the first.
    """
    path = folder / SPLITS[split]
    videos = MediaFolder(folder / "videos")
    examples = []
    for number, record in enumerate(files.as_list(files.read_json(str(path)), str(path))):
        where = f"{path}, entry {number},"
        name = files.field(record, "videoID", where, str)
        captions = files.texts(record, "enCap", where)
        examples.append(BenchmarkExample(name, find_clip(videos, name, where), captions))
    return SplitContent(examples, [path])


def find_clip(videos: MediaFolder, name: str, where: str) -> ClipFile:
    """Finds a clip: in a file of its own, named as the clip, or else in the whole video's.

    Args:
      name: the YouTube id, the start and the end in seconds: "Ptf_2VRj-V0_000122_000132".
      where: how an error names the record.

    Raises: UserError for a name of another form.
    """
    youtube, _, seconds = name.rpartition("_")
    youtube, _, start = youtube.rpartition("_")
    if not youtube or not start.isdecimal() or not seconds.isdecimal():
        raise UserError(f"{where} has the videoID {name!r}, not YouTubeID_start_end")
    clip = videos.clip(name)
    whole = videos.clip(youtube, float(start), float(seconds))
    return whole if whole.there and not clip.there else clip


VATEX = BenchmarkSet(
    name="vatex",
    title="VATEX",
    layout={
        ", ".join(SPLITS.values()): "captions",
        "videos/": "clips Ptf_2VRj-V0_000122_000132.mp4, ..., or whole videos Ptf_2VRj-V0.mp4, ...",
    },
    kind="generate",
    template=CAPTION,
    scorer="captions",
    read=read,
    splits=tuple(SPLITS),
    support="train",
    video=True,
)
