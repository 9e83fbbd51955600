"""The table of the synthetic world's datasets, on which the quickstart trains and is
evaluated.

Each record is a pure function of its dataset, split, index and a seed.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.synthetic_world.language import output_text
from data_pipelines.synthetic_world.records import (
    WorldRecord,
    binding_page,
    clip,
    document,
    lookups,
    namings,
    noisy_pair,
    page,
    pair,
    question,
)
from data_pipelines.synthetic_world.scenes import (
    HELD_OUT,
    SEEN,
    TAUGHT_SHARES,
    Thing,
    draw_one,
    draw_scene,
    draw_two,
)


@dataclasses.dataclass(frozen=True)
class WorldDataset:
    """A dataset of the synthetic world.

    kind: one of `features.KINDS`.
    draw: makes a record about the given things.
    sizes: {split: number of records}.
    about: a phrase for its description.
    """

    kind: str
    draw: Callable[[np.random.Generator, Sequence[Thing]], WorldRecord]
    sizes: dict[str, int]
    about: str


HELD_OUT_SPLIT = "unseen"
"""The split whose images show colour-shape pairs that no other split shows."""
_draw_taught = functools.partial(draw_scene, shares=TAUGHT_SHARES)
_TESTS = {"test": 300, HELD_OUT_SPLIT: 300}
# Named after the paper's data (LTIP, VTP, M3W); "align" stands for ALIGN's noisy pairs.
DATASETS: dict[str, WorldDataset] = {
    "align": WorldDataset(
        "pairs", noisy_pair, {"train": 8_000, "validation": 300}, "short noisy captions"
    ),
    "ltip": WorldDataset(
        "pairs",
        functools.partial(pair, draw=_draw_taught, describe=output_text),
        {"train": 16_000, "validation": 300},
        "clean captions",
    ),
    "vtp": WorldDataset(
        "videos", clip, {"train": 2_500, "validation": 200}, "clips of one moving thing"
    ),
    "m3w": WorldDataset(
        "pages",
        page,
        {"train": 3_000, "validation": 200},
        "pages of captions, questions and new words",
    ),
    "text": WorldDataset(
        "text",
        lambda rng, _: document(rng),
        {"train": 20_000, "validation": 200},
        "text that mirrors the pages",
    ),
    "namings": WorldDataset(
        "text",
        lambda rng, _: namings(rng),
        {"validation": 200},
        "new words bound in text alone",
    ),
    "lookups": WorldDataset(
        "text",
        lambda rng, _: lookups(rng),
        {"validation": 200},
        "many things and questions about them",
    ),
    "caption_one": WorldDataset(
        "pairs", functools.partial(pair, draw=draw_one), _TESTS, "images of one thing"
    ),
    "caption_two": WorldDataset(
        "pairs", functools.partial(pair, draw=draw_two), _TESTS, "images of two things"
    ),
    "vqa": WorldDataset("questions", question, _TESTS, "questions about images"),
    "motion": WorldDataset(
        "videos",
        functools.partial(clip, plain=True),
        {"test": 200, HELD_OUT_SPLIT: 200},
        "clips to caption",
    ),
    "binding": WorldDataset(
        "pages", binding_page, {"test": 200}, "two new words, 32 supports and a query"
    ),
}


def make_record(dataset: str, split: str, index: int, seed: int = 0) -> WorldRecord:
    """Makes record `index` of a split, a pure function of the arguments."""
    spec = DATASETS[dataset]
    rng = np.random.default_rng([seed, zlib.crc32(f"{dataset}/{split}".encode()), index])
    made = spec.draw(rng, HELD_OUT if split == HELD_OUT_SPLIT else SEEN)
    return dataclasses.replace(made, record={"id": f"{dataset}/{split}/{index}", **made.record})
