"""One endless, elastic iterator per dataset: rows are planned first, then read by position.

A row's place in the endless stream decides its epoch and its items; nothing is drawn from a stream of random numbers. So any process
can make any row, an interrupted run goes on with the next row, and one on more or fewer processes has the same rows in each batch.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from data_pipelines.encoded import Encoder
from data_pipelines.rows import Making, Rows, Task
from data_pipelines.transforms.examples import Arrays
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.processing.tokenizer import Tokenizer

CACHE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Shard:
    """This process's part of every global batch: rows index, index + count, index + 2 count, ..."""

    index: int = 0
    count: int = 1


WHOLE = Shard()


class BatchIterator:
    """Endless batches of this process's rows, as dicts of numpy arrays. `summary` says what the plan could not use."""

    def __init__(self, rows: Rows, batch_size: int, shard: Shard, threads: int):
        self._rows, self._size, self._shard = rows, batch_size, shard
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        self._go_to(0)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Arrays:
        batch = next(self._iterator)
        self._next += self._size
        return batch

    def _go_to(self, first: int) -> None:
        """Batches of rows from `first` on; grain's threads make them ahead."""
        self._next = first
        # A range without end keeps the epoch in the rows' places: grain repeats a dataset by its indices' remainder.
        batches = grain.MapDataset.range((sys.maxsize - first) // self._size).map(lambda number: self._make(first + number * self._size))
        self._iterator = iter(batches.to_iter_dataset(self._options))

    def _make(self, first: int) -> Arrays:
        return place_visuals(self._rows.batch(range(first + self._shard.index, first + self._size, self._shard.count)), self._shard)

    def get_state(self) -> dict[str, int]:
        """The position after the last batch given, the same on every process: {"global_next_index": rows used so far}."""
        return {"global_next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position that any number of processes saved."""
        self._iterator.close()
        self._go_to(state["global_next_index"])

    def summary(self) -> dict[str, Any]:
        """Counts of records and rows, and of what was left out or cut, by reason."""
        return self._rows.summary()

    def close(self) -> None:
        """Stops the threads that read ahead."""
        self._iterator.close()


def make_iterator(
    dataset: DatasetConfig,
    *,
    tokenizer: Tokenizer,
    task: Task,
    image_size: int = 0,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    seed: int = 0,
    shard: Shard = WHOLE,
    text_length: int = 64,
    threads: int = 2,
    source: Sequence[Any] | None = None,
    cache_bytes: int = CACHE_BYTES,
    encoder: Encoder | None = None,
) -> BatchIterator:
    """This process's rows of the dataset's global batches, without end, in a new order and with new draws each epoch.

    Args:
      image_size, mean: side of the square pictures, and the colour (0..1 a channel) that pads them.
      text_length: tokens of a text in the contrastive stage.
      threads: each makes one whole batch; 0 makes batches when they are asked for.
      source: records to read in place of those at `dataset.path`.
      cache_bytes: records stay in memory, their pictures decoded, until these are used.
      encoder: every picture is encoded once, here, and batches hold `features` [B * N, T, S, C] in place of images.

    Returns:
      Batches of `batch_size / shard.count` = B rows. flamingo: images uint8 [B * N, T, H, W, 3], frame_mask bool [B * N, T], visuals int32
      [B, N] (places in the images of all shards joined), tokens, positions, segments, media_index int32 [B, L], loss_mask bool [B, L]; a
      dataset of texts has no images, frame_mask and visuals. language_modelling: those of [B, L] but media_index. contrastive: images
      uint8 [B, H, W, 3], tokens int32 [B, text_length], mask bool [B, text_length].

    Raises:
      UserError: no such folder or split, nothing in it that fits a row, a kind that the task cannot read, fewer pairs than a contrastive
        batch, or (while iterating) too many records that cannot be decoded.
    """
    _check_split(dataset, shard)
    making = Making(dataset, task, tokenizer, image_size, tuple(mean), text_length, seed, True, encoder, (shard.index, shard.count))
    rows = Rows(making, source, cache_bytes)
    if task == "contrastive" and len(rows) < dataset.batch_size:
        raise UserError(
            f"the dataset {rows.name} has {len(rows)} pairs, fewer than its batch_size of {dataset.batch_size}, so that a batch would hold a pair "
            "twice, each the other's negative; make batch_size smaller"
        )
    return BatchIterator(rows, dataset.batch_size, shard, threads)


def held_out(
    dataset: DatasetConfig,
    *,
    tokenizer: Tokenizer,
    task: Task,
    batches: int,
    image_size: int = 0,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    shard: Shard = WHOLE,
    text_length: int = 64,
    source: Sequence[Any] | None = None,
    encoder: Encoder | None = None,
) -> list[Arrays]:
    """At most `batches` batches that are the same at every call: one order, and no draws (the first caption without a leading space,
    the first window and clip, "previous" visuals, no augmentation). Rows that are missing in the last batch are padding; the contrastive
    stage, where each row is every other's negative, has whole batches alone.

    Args and Raises as `make_iterator`; also UserError where there is not even one contrastive batch.
    """
    _check_split(dataset, shard)
    making = Making(dataset, task, tokenizer, image_size, tuple(mean), text_length, 0, False, encoder, (shard.index, shard.count))
    rows = Rows(making, source, CACHE_BYTES)
    size = dataset.batch_size
    whole = len(rows) // size
    if task == "contrastive" and not whole:
        raise UserError(f"the held-out dataset {rows.name} has {len(rows)} pairs, fewer than its batch_size of {size}; make it smaller")
    count = min(batches, whole if task == "contrastive" else -(-len(rows) // size))
    made = []
    for first in range(0, count * size, size):
        mine = [rows.row(place) if place < len(rows) else rows.padding() for place in range(first + shard.index, first + size, shard.count)]
        made.append(place_visuals({name: np.stack([row[name] for row in mine]) for name in mine[0]}, shard))
    return made


def place_visuals(batch: Arrays, shard: Shard) -> Arrays:
    """Rows' own images [B, N, ...] as one list [B * N, ...], with `visuals` counting through the lists of all shards joined."""
    if "visuals" not in batch:
        return batch
    rows, places = batch["visuals"].shape
    start = (shard.index * rows + np.arange(rows, dtype=np.int32)) * places
    flat = {name: batch[name].reshape(rows * places, *batch[name].shape[2:]) for name in ("images", "features", "frame_mask") if name in batch}
    return batch | flat | {"visuals": np.where(batch["visuals"] >= 0, batch["visuals"] + start[:, None], -1).astype(np.int32)}


def _check_split(dataset: DatasetConfig, shard: Shard) -> None:
    if dataset.batch_size % shard.count:
        raise UserError(f"a batch of {dataset.batch_size} rows cannot be split over {shard.count} data shards; make it a multiple of them")
