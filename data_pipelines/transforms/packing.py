"""Packs examples into rows by first fit: a pure function of their lengths, the seed, the
dataset and the epoch.
"""

import dataclasses

import numpy as np

from data_pipelines.transforms.randomness import generator

OPEN_ROWS = 64
"""Rows that are open at a time.

It bounds the work per example; more open rows hardly improve the fill.
"""


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """The rows of an epoch: row r holds the items `items[offsets[r]:offsets[r + 1]]`.

    items: int32, indices of examples.
    offsets: int [rows + 1].
    too_long: how many items exceed a whole row and are never used.
    dropped: how many items are left out of this epoch because the number of rows is fixed.
    fill: fraction of the rows' tokens that is not padding.
    """

    items: np.ndarray
    offsets: np.ndarray
    too_long: int
    dropped: int
    fill: float

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, place: int) -> np.ndarray:
        """Returns the items of one row: int32 [items in it]."""
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

    Items are shuffled by (seed, dataset, epoch); each goes into the first open row with room
    for it, of at most `OPEN_ROWS`.

    Args:
      lengths, visuals: int [items], tokens and visuals of each.
      rows: the number of rows to return, so that each epoch has the same; None for as many as
        packing gives. If packing gives more, the emptiest rows are left out and their items
        counted as dropped (other items in other epochs); if fewer, the rows with the most
        items are split in two.
      dataset: its name, so that datasets of equal size are shuffled differently.
      pack: False gives each item a row of its own, at most `rows` of them.
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
    """Assigns items, in order, to the first open row that has room."""
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
            # No open row has room: open one, and close the fullest if there are too many.
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
        # Close a row that not even the smallest item fits into.
        if free[slot] < smallest or places[slot] < fewest:
            done.append(rows.pop(slot))
            del free[slot], places[slot]
    return done + rows


def _exactly(
    filled: list[list[int]], rows: int, lengths: np.ndarray
) -> tuple[list[list[int]], int]:
    """Drops or splits rows until there are `rows`; returns them and the dropped items' count."""
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
