"""YouCook2: captions of the steps of cooking videos (Zhou et al. 2018)."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files

ANNOTATIONS = "youcookii_annotations_trainval.json"
SPLITS = {"val": "validation", "train": "training"}
"""Names here -> in the file. The sentences of the test videos are kept by the authors."""


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads the owners' file: {"database": {video: {"subset", "annotations": [{"id", "segment":
    [start, end], "sentence"}]}}}.

    Each segment is a query of its own with one reference, and CIDEr is over all of them; errors
    are over videos.
    """
    place = str(folder / ANNOTATIONS)
    content = files.as_dict(files.read_json(place), place)
    videos = MediaFolder(folder / "raw_videos" / SPLITS[split], nested=True)
    examples = []
    for video, record in files.as_dict(content.get("database"), f"{place}'s database").items():
        where = f"{place}, video {video},"
        if files.field(record, "subset", where, str) != SPLITS[split]:
            continue
        for step in files.field(record, "annotations", where, list):
            start, end = segment(files.field(step, "segment", where, list), where)
            examples.append(
                BenchmarkExample(
                    f"{video}/{files.field(step, 'id', where, int, str)}",
                    videos.clip(video, start, end),
                    (files.field(step, "sentence", where, str),),
                    cluster=video,
                )
            )
    return SplitContent(examples, [folder / ANNOTATIONS])


def segment(seconds: list[object], where: str) -> tuple[float, float]:
    """Checks the start and end of a segment; raises UserError."""
    if len(seconds) == 2:
        start, end = seconds
        if isinstance(start, int | float) and isinstance(end, int | float) and 0 <= start < end:
            return float(start), float(end)
    raise UserError(f"{where} has the segment {seconds!r}, not its start and end in seconds")


YOUCOOK2 = BenchmarkSet(
    name="youcook2",
    title="YouCook2",
    layout={
        ANNOTATIONS: "sentences of training and validation",
        "raw_videos/validation/, raw_videos/training/": "a folder for each recipe type, with videos"
        " GLd3aX16zBg.mp4, ...; or the videos",
    },
    kind="generate",
    template=CAPTION,
    scorer="captions",
    read=read,
    splits=tuple(SPLITS),
    support="train",
    video=True,
)
