"""Kinetics-700-2020 (Smaira et al. 2020): 700 human actions in clips of ten seconds."""

import pathlib

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.benchmarks.benchmark_set import BenchmarkSet, SplitContent
from flamingo_jax.evaluation.benchmarks.media_folder import MediaFolder
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.scoring import files

BOTH = "mean of top-1 and top-5"


def read(folder: pathlib.Path, split: str) -> SplitContent:
    """Reads a split's list. Clips are files of the ten seconds, named as the Common Visual Data
    Foundation distributes them, <youtube_id>_<start>_<end>.mp4, in one folder or one for each
    label.
    """
    place = folder / f"{split}.csv"
    clips = MediaFolder(folder / split)
    by_label: dict[str, MediaFolder] = {}
    examples, labels = [], set()
    columns = ("label", "youtube_id", "time_start", "time_end")
    for number, row in enumerate(files.read_csv(str(place), columns), 2):
        where = f"{place}, row {number},"
        label = row["label"]
        if not label:
            raise UserError(f"{where} has no label: name a split that has them")
        start = files.whole_number(row, "time_start", where)
        end = files.whole_number(row, "time_end", where)
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}"
        if label not in labels and label in clips.names:
            by_label[label] = MediaFolder(clips.path / label)
        labels.add(label)
        media = by_label.get(label, clips).clip(name)
        examples.append(BenchmarkExample(name, media, (label,), cluster=row["youtube_id"]))
    return SplitContent(examples, [place], sorted(labels))


KINETICS_700 = BenchmarkSet(
    name="kinetics700",
    title="Kinetics-700-2020",
    layout={
        "{val,train}.csv": "labels and times of the clips",
        "{val,train}/": "clips 0wR5jVB-WPk_000417_000427.mp4, ..., or folders of them by label",
    },
    kind="rank",
    template=CAPTION,
    scorer="top_k",
    read=read,
    splits=("val", "train"),
    support="train",
    scorer_options={"headline": BOTH},
    shots=(8, 16),
    video=True,
    per_class=32,
)
