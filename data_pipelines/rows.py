"""The rows of a dataset: which examples share one, and its arrays, from nothing but its place
in the endless stream of rows.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipelines.feature_cache import CachedFeatures, Encoder, load_or_encode
from data_pipelines.features import dataset_folder
from data_pipelines.readers import PendingBatch, Readers, Work
from data_pipelines.records import (
    IMAGE_FEATURES,
    DamagedError,
    Failures,
    Record,
    RecordCache,
    open_records,
)
from data_pipelines.row_items import RowItems
from data_pipelines.transforms.buffers import BufferPool
from data_pipelines.transforms.examples import (
    Arrays,
    RecordRandom,
    Segment,
    answer_of,
    assemble,
    caption_of,
    empty_segment,
    flamingo_segment,
    opening_of,
    strings,
    text_segment,
)
from data_pipelines.transforms.lengths import CaptionChoices, load_or_measure, measure
from data_pipelines.transforms.packing import PackingPlan, plan_rows
from data_pipelines.transforms.visual_buffer import (
    VisualBuffer,
    feature_format,
    image_format,
    schedule_reads,
)
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard
from flamingo_jax.processing.images import Fit, ImageError
from flamingo_jax.processing.sequences import pair_overhead, question_tokens, text_tokens
from flamingo_jax.processing.tokenizer import Tokenizer

Task = Literal["contrastive", "language_modelling", "flamingo"]
KINDS: dict[str, tuple[str, ...]] = {
    "contrastive": ("pairs", "questions"),
    "language_modelling": ("text", "questions"),
    "flamingo": ("pages", "pairs", "videos", "text", "questions"),
}
"""The kinds of dataset that each task can read."""


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """What rows are made from and for. training: False makes no draws, so that every visit of a
    record is the same. encoder: rows hold its features in place of images.
    """

    dataset: DatasetConfig
    task: Task
    tokenizer: Tokenizer
    image_size: int
    mean: tuple[float, ...]
    text_length: int
    seed: int
    training: bool
    encoder: Encoder | None = None
    process: tuple[int, int] = (0, 1)
    """This one and how many there are: each encodes its part."""
    name: str = ""
    """The dataset's in the config: part of the key of all that is drawn for it."""
    image_fit: Fit = "pad"


class PlannedRow(NamedTuple):
    """The items of a row, the epoch it stands in, and the captions that were chosen for that
    epoch.
    """

    items: np.ndarray
    epoch: int
    choices: CaptionChoices | None


class Visit(NamedTuple):
    """A record's place in the dataset and what a row has of it."""

    place: int
    record: Record
    segment: Segment


class VisualLayout(NamedTuple):
    """Where the visuals of a share's rows stand, which is the same in every batch.

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
        """Of batches of `size` rows with `visuals` each."""
        own, listed = host_shard.row_visuals(size, visuals), host_shard.visuals(size, visuals)
        places = {visual: place for place, visual in enumerate(listed.tolist())}
        return cls(
            own, len(listed), [[places.get(visual) for visual in row] for row in own.tolist()]
        )


class RowReader:
    """Every row of every epoch by its place in the endless stream of rows.

    Safe to use from several threads.
    """

    def __init__(self, making: RowSpec, source: Sequence[Any] | None, cache_bytes: int):
        """source: records in place of those at the dataset's path; cache_bytes: records stay in
        memory until these are used.
        """
        dataset, task = making.dataset, making.task
        if dataset.kind not in KINDS[task]:
            kinds = " or ".join(KINDS[task])
            raise UserError(
                f"the {task} task reads datasets of kind {kinds}, and {dataset.path!r} is of"
                f" kind {dataset.kind}; take it out"
            )
        self.name = dataset.path or dataset.kind
        if dataset.kind == "questions" and "{question}" not in dataset.prompt:
            raise UserError(
                f"the prompt {dataset.prompt!r} of the dataset {self.name} has no {{question}}"
                " in it, so that nothing would be asked; write it in"
            )
        self._making = making
        self._looks = task != "language_modelling" and dataset.kind != "text"
        opened = (
            source
            if source is not None
            else open_records(dataset.path, dataset.split, dataset.kind)
        )
        if not len(opened):
            raise UserError(
                f"the split {dataset.split!r} of the dataset {self.name} is empty; name another"
                " split"
            )
        self._records = RecordCache(
            opened,
            dataset.kind,
            making.image_size,
            making.image_fit,
            cache_bytes=cache_bytes,
            with_images=self._looks and making.encoder is None,
        )
        self._failures = Failures(self.name, len(opened))
        self._cut = np.zeros(len(opened), bool)
        self._items = self._make_items(opened, source is None)
        self._lock = threading.Lock()
        self._plans: dict[int, tuple[PackingPlan, CaptionChoices | None]] = {}
        self._count = self._whole_batches()
        self._dropped = 0
        self._first, _ = self._plan(0)
        self._count = len(self._first)
        if not self._count:
            raise UserError(
                f"nothing in the dataset {self.name} fits a row of {dataset.max_length} tokens and"
                f" {dataset.visuals} visuals; raise its `max_length` or `visuals`"
            )
        self._canvas = image_format(making.image_size, making.mean)
        self._blanks = BufferPool()
        self._encoded: CachedFeatures | None = None
        if making.encoder is not None and self._looks:
            self._encoded = self._encode(opened, making.encoder)
            self._canvas = feature_format(self._encoded.shape, self._encoded.dtype)

    def __len__(self) -> int:
        """Rows in an epoch, the same in every epoch."""
        return self._count or 0

    def _whole_batches(self) -> int | None:
        """Rows of an epoch of contrastive training, None for any that the first plan gives.

        Only whole batches: in one of two epochs a pair could stand twice, each the other's
        negative. What is left over is another pair in each epoch.
        """
        if self._making.task != "contrastive" or not self._making.training:
            return None
        items, size = len(self._items.record), self._making.dataset.batch_size
        return items - items % size if items >= size else None

    def _encode(self, opened: Sequence[Any], encoder: Encoder) -> CachedFeatures:
        dataset = self._making.dataset
        if dataset.flip or dataset.colour:
            raise UserError(
                f"the dataset {self.name} is augmented, so its features cannot be kept: set its"
                " flip and colour to 0, or training.cache_features off"
            )
        index, count = self._making.process
        return load_or_encode(
            opened,
            IMAGE_FEATURES[dataset.kind],
            encoder,
            dataset_folder(dataset.path),
            dataset.split,
            image_size=self._making.image_size,
            mean=self._making.mean,
            image_fit=self._making.image_fit,
            index=index,
            count=count,
        )

    def _make_items(self, opened: Sequence[Any], stored: bool) -> RowItems:
        dataset = self._making.dataset
        contrastive = self._making.task == "contrastive"
        if contrastive and dataset.kind == "pairs":
            count = np.arange(len(opened), dtype=np.int32)
            self._measured = self._lengths = None
            return RowItems(
                count,
                np.zeros_like(count),
                np.ones_like(count),
                np.zeros_like(count),
                np.ones_like(count),
            )
        if stored:
            lengths = load_or_measure(
                opened,
                dataset.kind,
                self._making.tokenizer,
                dataset_folder(dataset.path),
                dataset.split,
                dataset.prompt,
            )
        else:
            lengths = measure(opened, dataset.kind, self._making.tokenizer, dataset.prompt)
        if dataset.kind != "questions":
            self._cut = lengths.tokens > dataset.max_length
        self._measured, self._lengths = lengths, lengths if len(lengths.captions) else None
        if (
            dataset.kind in ("pairs", "videos")
            and dataset.max_length < pair_overhead(self._making.tokenizer) + 1
        ):
            raise UserError(
                f"rows of {dataset.max_length} tokens have no room for a caption in the dataset"
                f" {self.name}; raise its `max_length`"
            )
        if contrastive:
            return RowItems.by_visual(lengths)
        if self._looks:
            return RowItems.of(lengths, dataset)
        # As texts, questions share nothing.
        items = RowItems.of(dataclasses.replace(lengths, same=np.zeros_like(lengths.same)), dataset)
        return dataclasses.replace(items, visuals=np.zeros_like(items.visuals))

    def _choose(self, epoch: int) -> CaptionChoices | None:
        """Captions are chosen before rows are planned: a row planned for the longest of several
        would be a third empty.
        """
        if self._lengths is None:
            return None
        making = self._making
        return (
            self._lengths.choose(making.dataset.leading_space, making.seed, epoch, making.name)
            if making.training
            else self._lengths.first_captions()
        )

    def _plan(self, epoch: int) -> tuple[PackingPlan, CaptionChoices | None]:
        with self._lock:
            if epoch not in self._plans:
                # Threads read ahead over the end of an epoch, so two plans are alive at a time.
                for old in sorted(self._plans)[:-1]:
                    del self._plans[old]
                choices = self._choose(epoch)
                length = self._items.length
                if choices is not None and self._lengths is not None:
                    length = np.minimum(self._lengths.of(choices), self._making.dataset.max_length)
                made = plan_rows(
                    length,
                    self._items.visuals,
                    row_length=self._making.dataset.max_length,
                    row_visuals=self._making.dataset.visuals,
                    seed=self._making.seed,
                    epoch=epoch,
                    dataset=self._making.name,
                    rows=self._count,
                    pack=self._making.dataset.pack and self._making.task != "contrastive",
                )
                self._plans[epoch] = made, choices
                self._dropped = made.dropped
            return self._plans[epoch]

    def batch(
        self,
        first: int,
        size: int,
        host_shard: HostShard = WHOLE_BATCH,
        readers: Readers | None = None,
        order: float = 0,
    ) -> PendingBatch:
        """A share of the global batch of the `size` rows from `first` on; those past a pass
        over fixed rows are padding.

        readers: what makes it, in this order among their batches; None leaves that to whoever
          asks for the result.
        """
        return PendingBatch(
            lambda batch: self._begin(batch, first, size, host_shard), readers, order
        )

    def _begin(
        self, batch: PendingBatch, first: int, size: int, host_shard: HostShard
    ) -> Callable[[], Arrays]:
        """Adds the batch's work, a row's or an image's at a time; returns what finishes it."""
        if self._making.task == "contrastive":
            # Where another batch size left off in the midst of one: no batch holds rows of two
            # epochs.
            first = -(-first // size) * size
        rows = [self._planned(place) for place in (first + host_shard.rows(size)).tolist()]
        if self._making.task == "contrastive":
            return self._pairs(batch, rows)
        if self._looks:
            return self._visuals(
                batch, rows, VisualLayout.of(host_shard, size, self._making.dataset.visuals)
            )
        made: list[list[Segment]] = [[] for _ in rows]
        for row, segments in zip(rows, made, strict=True):
            batch.add(lambda row=row, segments=segments: segments.extend(self._texts(row)))  # type: ignore[misc]
        return lambda: self._finish(made)

    def _planned(self, place: int) -> PlannedRow:
        """The row at this place; an empty one past a pass over fixed rows."""
        if not self._making.training and place >= len(self):
            return PlannedRow(np.zeros(0, np.int32), 0, None)
        epoch, within = divmod(place, len(self))
        planned, choices = self._plan(epoch)
        return PlannedRow(planned.row(within), epoch, choices)

    def _draws(
        self, epoch: int, record_id: str, caption: tuple[int, bool] | None = None
    ) -> RecordRandom | None:
        making = self._making
        return (
            RecordRandom(making.seed, epoch, record_id, caption, dataset=making.name)
            if making.training
            else None
        )

    def _finish(self, rows: Sequence[Sequence[Segment]]) -> Arrays:
        arrays = assemble(
            rows, length=self._making.dataset.max_length, pad_token=self._making.tokenizer.pad
        )
        if self._making.task == "language_modelling":
            del arrays["media_index"]
        return arrays

    def _texts(self, row: PlannedRow) -> list[Segment]:
        self._failures.saw(int(self._items.count[row.items].sum()))
        return [self._text(item, row.epoch) for item in row.items]

    def _text(self, item: int, epoch: int) -> Segment:
        place, length = int(self._items.record[item]), int(self._items.length[item])
        record, dataset, tokenizer = (
            self._records[place],
            self._making.dataset,
            self._making.tokenizer,
        )
        try:
            self._require_whole(place, record)
            if dataset.kind == "questions":
                answer = answer_of(record.fields, self._draws(epoch, record.id))
                document = record.once(
                    answer,
                    lambda: question_tokens(opening_of(record.fields, dataset), answer, tokenizer),
                )
            else:
                document = record.once(
                    "", lambda: text_tokens(strings([record.fields["text"]])[0], tokenizer)
                )
        except DamagedError as error:
            self._failures.add(record.id, error)
            return empty_segment(length, tokenizer.pad)
        self._require_length(place, record, len(document), None)
        start = 0 if dataset.kind == "questions" else int(self._items.start[item])
        return text_segment(
            document, start, len(document) if dataset.kind == "questions" else length
        )

    def _require_whole(self, place: int, record: Record) -> None:
        """Raises DamagedError where its bytes are damaged, or were when it was measured: its
        place in a row is a blank one's.
        """
        if record.damaged or (self._measured is not None and self._measured.damaged[place]):
            raise DamagedError

    def _require_length(
        self, place: int, record: Record, tokens: int, chosen: tuple[int, bool] | None
    ) -> None:
        """Raises UserError where a record is not as long as it was when it was measured: its
        row would have no room for it, or not show all.
        """
        if self._measured is None:
            return
        dataset, measured = self._making.dataset, self._measured.of_record(place, chosen)
        if dataset.kind in ("pairs", "videos"):
            measured = min(measured, dataset.max_length)
        # Of a question with several answers the longest was measured.
        if tokens > measured or (tokens < measured and dataset.kind != "questions"):
            raise self._changed(record, f"{tokens} tokens, where {measured} were measured")

    def _changed(self, record: Record, what: str) -> UserError:
        return UserError(
            f"the record {record.id!r} of the dataset {self.name} has {what}: its files were"
            " changed since; remove the files lengths_* that lie beside them and start again"
        )

    def _board(self, visuals: int, frames: int) -> VisualBuffer:
        return VisualBuffer.make(
            self._canvas,
            self._blanks,
            visuals,
            frames,
            self._making.training and self._making.dataset.colour > 0,
        )

    def _visuals(
        self, batch: PendingBatch, rows: Sequence[PlannedRow], standing: VisualLayout
    ) -> Callable[[], Arrays]:
        """Rows with the visuals that are decoded here.

        These, the most of a batch, are put where they shall lie and not copied again.
        """
        board = self._board(standing.decoded, self._making.dataset.frames)
        segments: list[list[Segment]] = [[] for _ in rows]
        seen = [0] * len(rows)

        def read(number: int) -> None:
            visits = self._visits(rows[number])
            segments[number] = [visit.segment for visit in visits]
            seen[number] = self._show(
                visits, board, standing.among[number], functools.partial(batch.add, soon=True)
            )

        def finish() -> Arrays:
            self._failures.saw(sum(seen))
            present = np.array([sum(len(segment.visuals) for segment in row) for row in segments])
            shown = np.where(
                np.arange(standing.visuals.shape[1]) < present[:, None], standing.visuals, -1
            )
            return board.finish(self._blanks) | {"visuals": shown} | self._finish(segments)

        # One thread alone makes all texts before the first image: in turn they would push
        # each other's code and data out of the processor's caches. Of several, some make texts
        # while others decode: those that all want the interpreter at once wait for one another.
        for number in range(len(rows)):
            batch.add(functools.partial(read, number))
        return finish

    def _visits(self, row: PlannedRow) -> list[Visit]:
        """What a row has of its records, in order."""
        items, epoch, choices = row
        visits: list[Visit] = []
        lost = False
        for item in items:
            first = int(self._items.record[item])
            for place in range(first, first + int(self._items.count[item])):
                record, shares = self._records[place], place > first
                chosen = (
                    None
                    if choices is None
                    else (int(choices.caption[place]), bool(choices.space[place]))
                )
                segment = self._segment(place, record, epoch, chosen)
                # Every process that reads the row finds the same damage, and blanks the
                # segments that would share the visual besides.
                lost = lost if shares else record.damaged
                segment = segment.blank() if lost else segment
                visits.append(Visit(place, record, segment.sharing() if shares else segment))
        return visits

    def _segment(
        self, place: int, record: Record, epoch: int, chosen: tuple[int, bool] | None
    ) -> Segment:
        """What a row shows of a record.

        Of one that is found damaged, which is noted in it, as many tokens with nothing to
        learn.
        """
        dataset, tokenizer = self._making.dataset, self._making.tokenizer
        try:
            self._require_whole(place, record)
            if chosen is not None and chosen[0] >= max(1, len(record.fields["captions"])):
                raise self._changed(record, f"no caption {chosen[0] + 1}, which was measured")
            segment = flamingo_segment(
                record, dataset, tokenizer, self._draws(epoch, record.id, chosen)
            )
        except DamagedError:
            record.damaged = True
            measured = 1 if self._measured is None else self._measured.of_record(place, chosen)
            return empty_segment(min(measured, dataset.max_length), tokenizer.pad)
        # A window is shorter than its page.
        tokens = len(record.made[""]) if dataset.kind == "pages" else len(segment.tokens)
        self._require_length(place, record, tokens, chosen)
        return segment

    def _show(
        self,
        visits: Sequence[Visit],
        board: VisualBuffer,
        places: Sequence[int | None],
        add: Callable[[Work], None],
    ) -> int:
        """Adds the work of reading a row's visuals to their `places` (see `schedule_reads`).

        Returns how many of its records are read here: what other processes read they count, or
        a share of all rows would be too small for the failures that are met here.
        """
        failed = lambda number, error: self._failures.add(visits[number].record.id, error)
        here = schedule_reads(
            [visit.segment for visit in visits],
            [self._reader(visit) for visit in visits],
            failed,
            board,
            places,
            add,
        )
        for visit, is_here in zip(visits, here, strict=True):
            if is_here and visit.record.damaged:
                self._failures.add(visit.record.id, ValueError("it is damaged on disk"))
        return sum(here)

    def _reader(self, visit: Visit) -> Callable[[int, int], np.ndarray]:
        encoded, record = self._encoded, visit.record
        if encoded is None:
            return record.read
        return lambda visual, frame: encoded.read(
            visit.place, sum(record.frame_counts[:visual]) + frame
        )

    def _pairs(self, batch: PendingBatch, rows: Sequence[PlannedRow]) -> Callable[[], Arrays]:
        board = self._board(len(rows), 1)
        tokens = np.full(
            (len(rows), self._making.text_length), self._making.tokenizer.pad, np.int32
        )
        mask = np.zeros(tokens.shape, bool)

        def read(number: int) -> None:
            ids = self._contrastive(rows[number], board, number)
            tokens[number, : len(ids)], mask[number, : len(ids)] = ids, True

        def finish() -> Arrays:
            self._failures.saw(sum(int(self._items.count[row.items].sum()) for row in rows))
            visuals = board.finish(self._blanks)
            del visuals["frame_mask"]
            return {name: array[:, 0] for name, array in visuals.items()} | {
                "tokens": tokens,
                "mask": mask,
            }

        for number in range(len(rows)):
            batch.add(functools.partial(read, number))
        return finish

    def _contrastive(self, row: PlannedRow, board: VisualBuffer, number: int) -> np.ndarray:
        """Tokens of a pair, whose image becomes the board's visual of this number. One whose
        image cannot be read is an empty image without one token, which the loss leaves out.

        An item of questions holds all about one visual: the pair is one of its frames and as
        many of them, answered, as the text has room for.
        """
        (item,), epoch, _ = row
        place, count = int(self._items.record[item]), int(self._items.count[item])
        record, length = self._records[place], self._making.text_length
        dataset, draws = self._making.dataset, self._draws(epoch, record.id)
        asking = dataset.kind == "questions"
        ids = np.zeros(0, np.int32)
        augmentation = None if draws is None else draws.augmentation(dataset)
        try:
            self._require_whole(place, record)
            ids = self._told(place, count, draws) if asking else self._caption(record, draws)
            frames = record.frame_counts[0]
            pixels = record.read(
                0, draws.below(frames) if asking and draws is not None and frames else 0
            )
            board.put(number, 0, pixels, augmentation)
        except ImageError as error:
            self._failures.add(record.id, error)
            ids = ids[:0]
        if len(ids) > length:
            self._cut[place] = True
            ids = np.append(ids[: length - 1], ids[-1])
        return ids

    def _caption(self, record: Record, draws: RecordRandom | None) -> np.ndarray:
        caption = caption_of(record.fields, draws)
        return record.once(caption, lambda: text_tokens(caption, self._making.tokenizer))

    def _told(self, first: int, count: int, draws: RecordRandom | None) -> np.ndarray:
        """<BOS>, whole questions with their answers, in any order, <EOS>: int32 [n], n at most
        the text's length where one of them fits it.
        """
        dataset, tokenizer = self._making.dataset, self._making.tokenizer
        told: list[int] = []
        for place in range(count) if draws is None else draws.order(count):
            record = self._records[first + place]
            if record.damaged:
                self._failures.add(record.id, DamagedError())
                continue
            answer = answer_of(record.fields, draws)
            make = (
                lambda: question_tokens(opening_of(record.fields, dataset), answer, tokenizer)[  # noqa: B023
                    1:-1
                ].tolist()
            )  # noqa: B023 - called at once
            ids = record.once(answer, make)
            if not told or len(told) + len(ids) + 2 <= self._making.text_length:
                told += ids
        return np.array([tokenizer.bos, *told, tokenizer.eos], np.int32)

    def summary(self) -> dict[str, Any]:
        """What became of the dataset.

        records, rows (in an epoch), fill (part of the first epoch's tokens that is no padding,
        None for contrastive pairs); cut: records longer than a row, which give a window, a
        caption without its end, or several pieces, and contrastive pairs whose caption was cut
        so far; too_long: items that fit no row; dropped: items that the newest epoch leaves out
        for an equal number of rows; failed: ids of records whose images could not be read so
        far.
        """
        return {
            "records": len(self._records),
            "rows": len(self),
            "fill": None if self._making.task == "contrastive" else self._first.fill,
            "cut": int(self._cut.sum()),
            "too_long": self._first.too_long,
            "dropped": self._dropped,
            "failed": sorted(self._failures.failed),
        }
