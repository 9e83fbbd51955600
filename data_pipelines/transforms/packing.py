"""Which examples share a row: a pure function of their lengths, the seed, the dataset and the
epoch.
"""

import dataclasses

import numpy as np

from data_pipelines.transforms.randomness import generator

OPEN_ROWS = 64
"""Rows that an example may still go into.

Bounds the work for each example; more fill rows hardly better.
"""


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Row r holds the items `items[offsets[r]:offsets[r + 1]]`.

    too_long: items that fit no row, in no epoch. dropped: items left out of this epoch because
      the number of rows is fixed.
    fill: part of the rows' tokens that is no padding.
    """

    items: np.ndarray
    offsets: np.ndarray
    too_long: int
    dropped: int
    fill: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, place: int) -> np.ndarray:
        """The items of one row, int32."""
        return self.items[self.offsets[place] : self.offsets[place + 1]]


def plan_rows(
    lengths: np.ndarray,
    visuals: np.ndarray,
    *,
    row_length: int,
    row_visuals: int,
    seed: int,
    epoch: int,
    dataset: str = "",
    rows: int | None = None,
    pack: bool = True,
) -> PackingPlan:
    """Plans rows of at most `row_length` tokens and `row_visuals` visuals, each item in at
    most one.

    Items come in an order shuffled by (seed, dataset, epoch) and go into the first of a bounded
    number of open rows that has room.

    Args:
      lengths, visuals: int [items], tokens and visuals of each.
      rows: the number of rows wanted, so that every epoch has the same. With too many, the
        emptiest are left out and their items counted as dropped (another epoch's order drops
        others); with too few, the rows of the most items are halved.
      dataset: its name, so that datasets of equal size have orders of their own.
      pack: False gives every item a row of its own; of those past `rows`, another epoch's order
        leaves out others.
    """
    lengths, visuals = np.asarray(lengths), np.asarray(visuals)
    rng = generator("order", seed, dataset, epoch)
    fits = (lengths <= row_length) & (visuals <= row_visuals)
    order = rng.permutation(len(lengths))
    order = order[fits[order]]
    dropped = 0
    if pack:
        filled = _first_fit(order, lengths, visuals, row_length, row_visuals)
        if rows is not None:
            filled, dropped = _exactly(filled, rows, lengths)
    else:
        filled = [[item] for item in order[:rows].tolist()]
        dropped = len(order) - len(filled)
    filled = [filled[place] for place in rng.permutation(len(filled))]
    items = np.array([item for row in filled for item in row], np.int32)
    offsets = np.cumsum([0, *map(len, filled)])
    fill = float(lengths[items].sum()) / max(len(filled) * row_length, 1)
    return PackingPlan(items, offsets, int((~fits).sum()), dropped, fill)


def _first_fit(
    order: np.ndarray,
    lengths: np.ndarray,
    visuals: np.ndarray,
    row_length: int,
    row_visuals: int,
) -> list[list[int]]:
    if not len(order):
        return []
    smallest, fewest = int(lengths[order].min()), int(visuals[order].min())
    done: list[list[int]] = []
    rows: list[list[int]] = []
    free: list[int] = []
    places: list[int] = []
    for item, length, count in zip(
        order.tolist(), lengths[order].tolist(), visuals[order].tolist(), strict=True
    ):
        for slot, room in enumerate(free):
            if room >= length and places[slot] >= count:
                break
        else:
            if len(rows) == OPEN_ROWS:
                fullest = free.index(min(free))
                done.append(rows.pop(fullest))
                del free[fullest], places[fullest]
            slot = len(rows)
            rows.append([])
            free.append(row_length)
            places.append(row_visuals)
        rows[slot].append(item)
        free[slot] -= length
        places[slot] -= count
        if free[slot] < smallest or places[slot] < fewest:
            done.append(rows.pop(slot))
            del free[slot], places[slot]
    return done + rows


def _exactly(
    filled: list[list[int]], rows: int, lengths: np.ndarray
) -> tuple[list[list[int]], int]:
    dropped = 0
    if len(filled) > rows:
        fullest_first = sorted(filled, key=lambda row: -int(lengths[row].sum()))
        filled, left = fullest_first[:rows], fullest_first[rows:]
        dropped = sum(map(len, left))
    while len(filled) < rows:
        most = max(range(len(filled)), key=lambda place: len(filled[place]))
        row, half = filled[most], len(filled[most]) // 2
        filled[most] = row[:half]
        filled.append(row[half:])
    return filled, dropped
