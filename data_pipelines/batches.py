"""Batch iterators of a dataset: endless for training, a fixed sequence for held-out data.

Rows are planned first, then read by index: a row's index in the endless stream determines its
epoch and its examples, independent of any random generator's state. So any process can make
any row, a resumed run continues with the next row, and a run on another number of processes
has the same rows in each batch.
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
"""Memory budget of each dataset for records with decoded images."""


AHEAD = 2
"""Batches of each dataset that are prefetched, besides the one being waited for."""


class BatchIterator:
    """Iterates endlessly over a process's shards of global batches, as dicts of numpy arrays.

    Its state is one number, the same on every process (`get_state`).
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
        """Begins batches until `count` are pending."""
        while len(self._pending) < count:
            # The batch's number is its priority: readers make all datasets' batches of one
            # update before those of the next.
            number = self._begun
            first = self._first + number * self._size
            self._pending.append(
                self._rows.batch(first, self._size, self._host_shard, self._readers, number)
            )
            self._begun += 1

    def _go_to(self, first: int) -> None:
        """Cancels pending batches and continues with row `first`."""
        for batch in self._pending:
            batch.cancel()
        self._pending.clear()
        self._first = self._next = first
        self._begun = 0

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last batch returned, the same on every process:
        {"global_next_index": rows used so far}. Prefetched batches do not count.
        """
        return {"global_next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a state of `get_state`, saved on any number of processes."""
        self._go_to(state["global_next_index"])

    def summary(self) -> dict[str, Any]:
        """Counts records and rows, and what was left out or cut (`RowReader.summary`)."""
        return self._rows.summary()

    def close(self) -> None:
        """Cancels prefetched batches; the readers, shared with other datasets, go on."""
        self._go_to(self._next)


class FixedBatches(Sequence[Arrays]):
    """The first `count` batches of a held-out dataset, the same on each pass.

    They are read again each time, so that only the prefetched ones are in memory.
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
        # A negative priority: before all training batches, which nobody waits for during an
        # evaluation.
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
    """Makes the endless training iterator of a dataset, reshuffled and redrawn each epoch.

    Args:
      image_size, mean, image_fit: side of the square images, the colour (0..1 per channel)
        that pads them, how they become squares.
      seed: of the order and all random draws.
      host_shard: which rows and visuals of a global batch this process reads.
      process: (index, count) of processes, which share the encoding of missing features.
      text_length: tokens of a text in contrastive training.
      readers: threads that prefetch batches; None makes each batch when it is asked for.
      source: records to read instead of those at `dataset.path`.
      cache_bytes: memory budget for records with decoded images.
      encoder: encode each image once, now, and return `features` [M, T, S, C] instead of
        images.
      name: the dataset's in the config, part of the key of its order and random draws.

    Returns:
      An iterator over batches of the B rows and M visuals of `host_shard`, by task:

      flamingo: images uint8 [M, T, H, W, 3], frame_mask bool [M, T], visuals int32 [B, N]
        (index row * N + n in the global batch, -1 for none), tokens, positions, segments,
        media_index int32 [B, L], loss_mask bool [B, L]. A dataset of text has no images,
        frame_mask and visuals.
      language_modelling: tokens, positions, segments int32 [B, L], loss_mask bool [B, L].
      contrastive: images uint8 [B, H, W, 3], tokens int32 [B, text_length], mask bool [B,
        text_length].

      Where `dataset.colour` is set, also jitter float32 [M, T, 6], contrastive [B, 6]
      (`flamingo_jax.processing.jitter`). A visual that cannot be read has no frames
      (frame_mask False) and the task masks the tokens that attend to it: since rows do not
      depend on pixels, processes that read the same row agree without reading the same images.

    Raises:
      UserError: no such folder or split, nothing that fits a row, a kind that the task cannot
        read, fewer pairs than a contrastive batch, or (while iterating) too many records that
        cannot be decoded.
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
    """Makes the held-out batches of a dataset, at most `batches`, the same at every call.

    The order is fixed and nothing is random: first caption without a leading space, first
    window and clip, "previous" visuals, no augmentation. The last batch is filled up with
    padding rows, except in contrastive training, where rows are each other's negatives and an
    incomplete batch is left out.

    Args and Raises: as `make_iterator`; also UserError where there is no complete contrastive
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
    """Raises UserError where a batch's rows do not divide over the data shards."""
    if dataset.batch_size % host_shard.row_shards:
        raise UserError(
            f"a batch of {dataset.batch_size} rows cannot be split over {host_shard.row_shards}"
            " data shards; make it a multiple of them"
        )
