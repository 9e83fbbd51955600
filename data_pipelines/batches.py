"""One endless, elastic iterator per dataset: rows are planned first, then read by position.

A row's place in the endless stream decides its epoch and its items; nothing is drawn from a
stream of random numbers. So any process can make any row, an interrupted run goes on with the
next row, and one on more or fewer processes has the same rows in each batch.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.feature_cache import Encoder
from data_pipelines.readers import PendingBatch, Readers
from data_pipelines.row_plans import RowSpec, TaskName
from data_pipelines.rows import RowReader
from data_pipelines.transforms.examples import Arrays
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard
from flamingo_jax.processing.images import Fit
from flamingo_jax.processing.tokenizer import Tokenizer

CACHE_BYTES = 256 << 20


AHEAD = 2
"""Batches of each dataset that are made ahead, beside the one that is asked for."""


class BatchIterator:
    """Gives endless batches of a process's share, as dicts of numpy arrays.

    `summary` says what the plan could not use.
    """

    def __init__(
        self, rows: RowReader, batch_size: int, host_shard: HostShard, readers: Readers | None
    ):
        self._rows, self._size, self._host_shard, self._readers = (
            rows,
            batch_size,
            host_shard,
            readers,
        )
        self._pending: collections.deque[PendingBatch] = collections.deque()
        self._go_to(0)

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Arrays:
        if not self._pending:
            self._begin(1)
        if self._readers is not None:
            self._begin(1 + AHEAD)
        batch = self._pending.popleft().result()
        self._next += self._size
        return batch

    def _begin(self, count: int) -> None:
        """Begins batches until so many are pending."""
        while len(self._pending) < count:
            # All datasets' batches of an update stand together in the readers' order.
            number = self._begun
            first = self._first + number * self._size
            self._pending.append(
                self._rows.batch(first, self._size, self._host_shard, self._readers, number)
            )
            self._begun += 1

    def _go_to(self, first: int) -> None:
        """Batches of rows from `first` on."""
        for batch in self._pending:
            batch.cancel()
        self._pending.clear()
        self._first = self._next = first
        self._begun = 0

    def get_state(self) -> dict[str, int]:
        """The position after the last batch given, the same on every process:
        {"global_next_index": rows used so far}.
        """
        return {"global_next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position that any number of processes saved."""
        self._go_to(state["global_next_index"])

    def summary(self) -> dict[str, Any]:
        """Counts of records and rows, and of what was left out or cut, by reason."""
        return self._rows.summary()

    def close(self) -> None:
        """Stops reading ahead; the readers go on with other datasets."""
        self._go_to(self._next)


class FixedBatches(Sequence[Arrays]):
    """Gives the same batches at every pass, read anew each time, so that no more of them are
    in memory than are made ahead.
    """

    def __init__(
        self,
        rows: RowReader,
        batch_size: int,
        count: int,
        host_shard: HostShard,
        readers: Readers | None,
    ):
        self._rows, self._size, self._count, self._host_shard, self._readers = (
            rows,
            batch_size,
            count,
            host_shard,
            readers,
        )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(f"there are {self._count} held-out batches")
        return self._begin(number).result()

    def __iter__(self) -> Iterator[Arrays]:
        ahead = 0 if self._readers is None else AHEAD
        pending: collections.deque[PendingBatch] = collections.deque()
        try:
            for number in range(self._count + ahead):
                if number < self._count:
                    pending.append(self._begin(number))
                if number >= ahead:
                    yield pending.popleft().result()
        finally:
            for batch in pending:
                batch.cancel()

    def _begin(self, number: int) -> PendingBatch:
        # Before all of training's, which nobody waits for meanwhile.
        return self._rows.batch(
            number * self._size, self._size, self._host_shard, self._readers, number - self._count
        )


def make_iterator(
    dataset: DatasetConfig,
    *,
    tokenizer: Tokenizer,
    task: TaskName,
    image_size: int = 0,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    image_fit: Fit = "pad",
    seed: int = 0,
    host_shard: HostShard = WHOLE_BATCH,
    process: tuple[int, int] = (0, 1),
    text_length: int = 64,
    readers: Readers | None = None,
    source: Sequence[Any] | None = None,
    cache_bytes: int = CACHE_BYTES,
    encoder: Encoder | None = None,
    name: str = "",
) -> BatchIterator:
    """Makes a process's share of the dataset's global batches, without end, in a new order and
    with new draws each epoch.

    Args:
      image_size, mean, image_fit: side of the square images, the colour (0..1 a channel) that
        pads them, how they become squares.
      text_length: tokens of a text in the contrastive stage.
      readers: the process's, which make batches ahead; None makes each batch when it is asked
        for.
      source: records to read in place of those at `dataset.path`.
      process: this one and how many there are, which make the features that are missing,
        whatever their shares.
      cache_bytes: records stay in memory, their images decoded, until these are used.
      encoder: every image is encoded once, here, and batches hold `features` [M, T, S, C] in
        place of images.
      name: the dataset's in the config; its order and all draws are its own, also where others
        have its size or its records.

    Returns:
      Batches of the B rows that the share reads and the M visuals that it decodes. flamingo:
      images uint8 [M, T, H, W, 3], frame_mask bool [M, T], visuals int32 [B, N] (row * N +
      place in the global batch, -1 for none), tokens, positions, segments, media_index int32
      [B, L], loss_mask bool [B, L]; a dataset of texts has no images, frame_mask and visuals.
      language_modelling: those of [B, L] but media_index.
      contrastive: images uint8 [B, H, W, 3], tokens int32 [B, text_length], mask bool [B,
      text_length]. With images stands jitter float32 [M, T, 6] or [B, 6] where `dataset.colour`
      asks for it (`flamingo_jax.processing.jitter`). What is of rows depends on no image
      but in the contrastive stage, where every reader of a row decodes it: a visual that cannot
      be read has no frame, and the task masks what looks at it.

    Raises:
      UserError: no such folder or split, nothing in it that fits a row, a kind that the task
        cannot read, fewer pairs than a contrastive batch, or (while iterating) too many records
        that cannot be decoded.
    """
    _check_split(dataset, host_shard)
    spec = RowSpec(
        dataset,
        task,
        tokenizer,
        image_size,
        tuple(mean),
        text_length,
        seed,
        True,
        encoder,
        process,
        name,
        image_fit,
    )
    rows = RowReader(spec, source, cache_bytes)
    if task == "contrastive" and len(rows) < dataset.batch_size:
        raise UserError(
            f"the dataset {rows.name} has {len(rows)} pairs, fewer than its batch_size of"
            f" {dataset.batch_size}, so that a batch would hold a pair twice, each the other's"
            " negative; make batch_size smaller"
        )
    return BatchIterator(rows, dataset.batch_size, host_shard, readers)


def make_held_out(
    dataset: DatasetConfig,
    *,
    tokenizer: Tokenizer,
    task: TaskName,
    batches: int,
    image_size: int = 0,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    image_fit: Fit = "pad",
    host_shard: HostShard = WHOLE_BATCH,
    process: tuple[int, int] = (0, 1),
    text_length: int = 64,
    source: Sequence[Any] | None = None,
    encoder: Encoder | None = None,
    name: str = "",
    readers: Readers | None = None,
) -> FixedBatches:
    """Makes at most `batches` batches that are the same at every call: one order, and no draws
    (the first caption without a leading space, the first window and clip, "previous" visuals,
    no augmentation). Rows that are missing in the last batch are padding; the contrastive
    stage, where each row is every other's negative, has whole batches alone.

    Args and Raises as `make_iterator`; also UserError where there is not even one contrastive
    batch.
    """
    _check_split(dataset, host_shard)
    spec = RowSpec(
        dataset,
        task,
        tokenizer,
        image_size,
        tuple(mean),
        text_length,
        0,
        False,
        encoder,
        process,
        name,
        image_fit,
    )
    rows = RowReader(spec, source, CACHE_BYTES)
    size = dataset.batch_size
    whole = len(rows) // size
    if task == "contrastive" and not whole:
        raise UserError(
            f"the held-out dataset {rows.name} has {len(rows)} pairs, fewer than its batch_size"
            f" of {size}; make it smaller"
        )
    count = min(batches, whole if task == "contrastive" else -(-len(rows) // size))
    return FixedBatches(rows, size, count, host_shard, readers)


def _check_split(dataset: DatasetConfig, host_shard: HostShard) -> None:
    if dataset.batch_size % host_shard.row_shards:
        raise UserError(
            f"a batch of {dataset.batch_size} rows cannot be split over {host_shard.row_shards}"
            " data shards; make it a multiple of them"
        )
