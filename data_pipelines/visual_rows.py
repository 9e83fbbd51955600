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
    """A record of a row: its place in the dataset, and the segment that shows it."""

    place: int
    record: Record
    segment: Segment


class VisualLayout(NamedTuple):
    """Where the visuals of a host's rows stand, which is the same in every batch.

    visuals: int32 [B, N], row * N + place in the global batch. decoded: M, those that are
      decoded here, with blanks.
    among: for each row and visual, its place among these, None for one that another process
      decodes.
    """

    visuals: np.ndarray
    decoded: int
    among: list[list[int | None]]

    @classmethod
    @functools.cache
    def of(cls, host_shard: HostShard, size: int, visuals: int) -> "VisualLayout":
        """The layout of batches of `size` rows with `visuals` each."""
        own, listed = host_shard.row_visuals(size, visuals), host_shard.visuals(size, visuals)
        places = {visual: place for place, visual in enumerate(listed.tolist())}
        return cls(
            own, len(listed), [[places.get(visual) for visual in row] for row in own.tolist()]
        )


class VisualRows:
    """Rows with the visuals that are decoded on this host."""

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
        """Adds the making of each row to the batch's work; returns what finishes the batch.

        Images, the most of a batch, are put where they shall lie and not copied again.
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

        # One thread alone makes all texts before the first image: in turn they would push
        # each other's code and data out of the processor's caches. Of several, some make texts
        # while others decode: those that all want the interpreter at once wait for one another.
        for number in range(len(rows)):
            batch.add(functools.partial(read, number))
        return finish

    def _row_records(self, row: PlannedRow) -> list[RowRecord]:
        """What a row has of its records, in order."""
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
                # Every process that reads the row finds the same damage, and blanks the
                # segments that would share the visual besides.
                damaged = damaged if shares else record.damaged
                segment = segment.blank() if damaged else segment
                found.append(RowRecord(place, record, segment.sharing() if shares else segment))
        return found

    def _segment(
        self, place: int, record: Record, epoch: int, caption: tuple[int, bool] | None
    ) -> Segment:
        """What a row shows of a record.

        Of one that is found damaged, which is noted in it, as many tokens with nothing to learn.
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
        # A window is shorter than its page.
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
        """Adds the work of reading a row's visuals to their `places` (see `schedule_reads`).

        Returns how many of its records are read here: what other processes read they count, or
        a share of all rows would be too small for the failures that are met here.
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
        """What reads a frame of a visual of a record: its pixels, or its features."""
        features, record = self._features, one.record
        if features is None:
            return record.read
        return lambda visual, frame: features.read(
            one.place, sum(record.frame_counts[:visual]) + frame
        )
