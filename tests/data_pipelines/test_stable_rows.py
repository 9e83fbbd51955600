"""What follows from a seed stays what it was in earlier versions: a run that goes on after an
upgrade has the rows that it would have had.
"""

import numpy as np

from data_pipelines.transforms.lengths import Lengths
from data_pipelines.transforms.packing import plan_rows
from data_pipelines.transforms.randomness import RecordRandom


def test_rows_are_planned_as_ever() -> None:
    lengths, visuals = np.arange(200) * 37 % 90 + 4, np.arange(200) % 4
    rows = plan_rows(
        lengths, visuals, row_length=128, row_visuals=5, seed=3, epoch=2, dataset="m3w", rows=70
    )
    assert rows.items[:12].tolist() == [24, 86, 78, 189, 140, 163, 186, 157, 25, 34, 13, 182]
    assert rows.offsets[:6].tolist() == [0, 3, 6, 9, 11, 14] and rows.dropped == 17


def test_records_draw_as_ever() -> None:
    rng = RecordRandom(3, 2, "a/b.png", dataset="m3w")
    assert (rng.uniform(), rng.below(1000)) == (0.5957475545757169, 493)
    assert rng.order(8) == [2, 5, 3, 7, 6, 4, 0, 1] and rng.happens(0.5)
    assert rng.uniform(-1, 1) == -0.7592410626711064


def test_captions_are_chosen_as_ever() -> None:
    ones, none = np.ones(100, np.int32), np.zeros(100, bool)
    lengths = Lengths(ones, ones, np.zeros((400, 2), np.int32), np.arange(0, 401, 4), none, none)
    chosen = lengths.choose(0.5, 3, 2, "m3w")
    assert chosen.caption[:12].tolist() == [1, 0, 3, 2, 3, 1, 2, 3, 1, 2, 1, 1]
    assert chosen.space[:12].tolist() == [bool(int(x)) for x in "110100010101"]
