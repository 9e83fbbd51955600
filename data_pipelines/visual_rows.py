"""Makes rows of the Flamingo task that show images or videos (paper 2.4, A.3)."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.feature_cache import CachedFeatures
from data_pipelines.readers import Job, PendingBatch
from data_pipelines.records import DamagedError, Record
from data_pipelines.row_context import RowContext
from data_pipelines.row_plans import PlannedRow
from data_pipelines.transforms.buffers import BufferPool
from data_pipelines.transforms.examples import Arrays, Segment, empty_segment, flamingo_segment
from data_pipelines.transforms.visual_buffer import FrameFormat, VisualBuffer, schedule_reads
from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.processing.images import ImageError


class RowRecord(NamedTuple):
    """A record in a row: its index in the dataset and its segment."""

    place: int
    record: Record
    segment: Segment


class VisualLayout(NamedTuple):
    """Which visuals of a batch this process decodes, the same in every batch.

    The vision encoder runs data-parallel over all devices, so a process may decode fewer
    visuals than its rows show.

    visuals: int32 [B, N], the index row * N + n of each visual in the global batch.
    decoded: M, the number of visuals decoded here, padding included.
    among: [B][N], each visual's index in 0..M - 1; None if another process decodes it.
    """

    visuals: np.ndarray
    decoded: int
    among: list[list[int | None]]

    @classmethod
    @functools.cache
    def of(cls, host_shard: HostShard, size: int, visuals: int) -> "VisualLayout":
        """Computes the layout of global batches of `size` rows with `visuals` each."""
        own, listed = host_shard.row_visuals(size, visuals), host_shard.visuals(size, visuals)
        places = {visual: place for place, visual in enumerate(listed.tolist())}
        return cls(
            own, len(listed), [[places.get(visual) for visual in row] for row in own.tolist()]
        )


class VisualRows:
    """Makes a process's rows, with those of their visuals that it decodes."""

    def __init__(
        self,
        context: RowContext,
        frame_format: FrameFormat,
        pool: BufferPool,
        features: CachedFeatures | None,
    ):
        self._context, self._frame_format, self._pool = context, frame_format, pool
        self._features = features

    def begin(
        self, batch: PendingBatch, rows: Sequence[PlannedRow], layout: VisualLayout
    ) -> Callable[[], Arrays]:
        """Adds a task per row to the batch; returns the function that finishes the batch.

        Images, most of a batch's bytes, are decoded straight into the batch's array.
        """
        dataset = self._context.spec.dataset
        jitters = self._context.spec.training and dataset.colour > 0
        buffer = VisualBuffer.make(
            self._frame_format, self._pool, layout.decoded, dataset.frames, jitters
        )
        segments: list[list[Segment]] = [[] for _ in rows]
        seen = [0] * len(rows)

        def read(number: int) -> None:
            records = self._row_records(rows[number])
            segments[number] = [one.segment for one in records]
            seen[number] = self._read_visuals(
                records, buffer, layout.among[number], functools.partial(batch.add, soon=True)
            )

        def finish() -> Arrays:
            self._context.failures.saw(sum(seen))
            present = np.array([sum(len(segment.visuals) for segment in row) for row in segments])
            places = np.arange(layout.visuals.shape[1])
            visuals = np.where(places < present[:, None], layout.visuals, -1)
            arrays = buffer.finish(self._pool) | {"visuals": visuals}
            return arrays | self._context.assemble(segments)

        # A single thread makes all texts before the first image: alternating between the two
        # would evict each other's code and data from the CPU caches. Of several threads, some
        # tokenise while others decode: all tokenising at once would wait for Python's
        # interpreter lock.
        for number in range(len(rows)):
            batch.add(functools.partial(read, number))
        return finish

    def _row_records(self, row: PlannedRow) -> list[RowRecord]:
        """Makes the segments of a row's records, in order."""
        found: list[RowRecord] = []
        damaged = False
        for item in row.items:
            places = self._context.plans.records(item)
            for place in places:
                record, shares = self._context.records[place], place > places.start
                caption = None
                if row.choices is not None:
                    caption = int(row.choices.caption[place]), bool(row.choices.space[place])
                segment = self._segment(place, record, row.epoch, caption)
                # Blank the segments too that would share the damaged record's visual. All
                # processes that read the row find the same damage and make the same row.
                damaged = damaged if shares else record.damaged
                segment = segment.blank() if damaged else segment
                found.append(RowRecord(place, record, segment.sharing() if shares else segment))
        return found

    def _segment(
        self, place: int, record: Record, epoch: int, caption: tuple[int, bool] | None
    ) -> Segment:
        """Makes a record's segment; for a damaged record, which is marked so, as many padding
        tokens without targets.
        """
        context, dataset = self._context, self._context.spec.dataset
        tokenizer = context.spec.tokenizer
        try:
            context.require_whole(place, record)
            if caption is not None and caption[0] >= max(1, len(record.fields["captions"])):
                raise context.changed(record, f"no caption {caption[0] + 1}, which was measured")
            segment = flamingo_segment(
                record, dataset, tokenizer, context.random(epoch, record.id, caption)
            )
        except DamagedError:
            record.damaged = True
            measured = context.plans.length(place, caption)
            length = min(1 if measured is None else measured, dataset.max_length)
            return empty_segment(length, tokenizer.pad)
        # A page was measured as a whole, and its window is shorter.
        tokens = len(record.made[""]) if dataset.kind == "pages" else len(segment.tokens)
        context.require_length(place, record, tokens, caption)
        return segment

    def _read_visuals(
        self,
        records: Sequence[RowRecord],
        buffer: VisualBuffer,
        places: Sequence[int | None],
        add: Callable[[Job], None],
    ) -> int:
        """Adds a task for each of the row's frames that are decoded here (`schedule_reads`).

        Returns: how many of the row's records are read here. Records that other processes read
          do not count: their failures are not seen here, which would dilute the fraction.
        """
        failures = self._context.failures

        def failed(number: int, error: ImageError) -> None:
            failures.add(records[number].record.id, error)

        here = schedule_reads(
            [one.segment for one in records],
            [self._reader(one) for one in records],
            failed,
            buffer,
            places,
            add,
        )
        for one, is_here in zip(records, here, strict=True):
            if is_here and one.record.damaged:
                failures.add(one.record.id, ValueError("it is damaged on disk"))
        return sum(here)

    def _reader(self, one: RowRecord) -> Callable[[int, int], np.ndarray]:
        """Returns the function (visual, frame) -> pixels, or cached features, of a record."""
        features, record = self._features, one.record
        if features is None:
            return record.read
        # Cached features are indexed by frame, counted over all of the record's visuals.
        return lambda visual, frame: features.read(
            one.place, sum(record.frame_counts[:visual]) + frame
        )
