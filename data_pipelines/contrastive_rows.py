"""Makes the rows of contrastive training: one image and one text each (paper B.1.3)."""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.readers import PendingBatch
from data_pipelines.records import DamagedError, Record
from data_pipelines.row_context import RowContext
from data_pipelines.row_plans import PlannedRow
from data_pipelines.transforms.buffers import BufferPool
from data_pipelines.transforms.examples import Arrays, answer_of, caption_of, question_prompt
from data_pipelines.transforms.randomness import RecordRandom
from data_pipelines.transforms.visual_buffer import FrameFormat, VisualBuffer
from flamingo_jax.processing.images import ImageError
from flamingo_jax.processing.sequences import question_tokens, text_tokens


class ContrastiveRows:
    """Makes a process's image-text pairs."""

    def __init__(self, context: RowContext, frame_format: FrameFormat, pool: BufferPool):
        self._context, self._frame_format, self._pool = context, frame_format, pool

    def begin(self, batch: PendingBatch, rows: Sequence[PlannedRow]) -> Callable[[], Arrays]:
        """Adds a task per pair to the batch; returns the function that finishes the batch."""
        spec = self._context.spec
        jitters = spec.training and spec.dataset.colour > 0
        buffer = VisualBuffer.make(self._frame_format, self._pool, len(rows), 1, jitters)
        tokens = np.full((len(rows), spec.text_length), spec.tokenizer.pad, np.int32)
        mask = np.zeros(tokens.shape, bool)

        def read(number: int) -> None:
            ids = self._pair(rows[number], buffer, number)
            tokens[number, : len(ids)], mask[number, : len(ids)] = ids, True

        def finish() -> Arrays:
            self._context.failures.saw(self._context.plans.records_in(rows))
            visuals = buffer.finish(self._pool)
            del visuals["frame_mask"]
            arrays = {name: array[:, 0] for name, array in visuals.items()}
            return arrays | {"tokens": tokens, "mask": mask}

        for number in range(len(rows)):
            batch.add(functools.partial(read, number))
        return finish

    def _pair(self, row: PlannedRow, buffer: VisualBuffer, number: int) -> np.ndarray:
        """Reads a pair: puts its image into the buffer and returns its tokens, int32 [n].

        A pair whose image cannot be read has a zero image and no tokens; the loss leaves it
        out. The questions about a visual make one pair: one of its frames, and as many
        questions with answers as fit the text.
        """
        context, dataset = self._context, self._context.spec.dataset
        (item,) = row.items
        places = context.plans.records(item)
        record, length = context.records[places.start], context.spec.text_length
        rng = context.random(row.epoch, record.id)
        asking = dataset.kind == "questions"
        ids = np.zeros(0, np.int32)
        augmentation = None if rng is None else rng.augmentation(dataset)
        try:
            context.require_whole(places.start, record)
            ids = self._questions(places, rng) if asking else self._caption(record, rng)
            frames = record.frame_counts[0]
            frame = rng.below(frames) if asking and rng is not None and frames else 0
            buffer.put(number, 0, record.read(0, frame), augmentation)
        except ImageError as error:
            context.failures.add(record.id, error)
            ids = ids[:0]
        if len(ids) > length:
            context.plans.cut[places.start] = True
            ids = np.append(ids[: length - 1], ids[-1])  # Keep <EOS> at the end.
        return ids

    def _caption(self, record: Record, rng: RecordRandom | None) -> np.ndarray:
        caption = caption_of(record.fields, rng)
        return record.cached(caption, lambda: text_tokens(caption, self._context.spec.tokenizer))

    def _questions(self, places: range, rng: RecordRandom | None) -> np.ndarray:
        """Tokenises <BOS>, whole questions with answers in random order, <EOS>: int32 [n].

        Adds questions while they fit the text's length, but at least one.
        """
        context, spec = self._context, self._context.spec
        ids: list[int] = []
        for number in range(len(places)) if rng is None else rng.order(len(places)):
            record = context.records[places[number]]
            if record.damaged:
                context.failures.add(record.id, DamagedError())
                continue
            answer = answer_of(record.fields, rng)
            more = record.cached(answer, functools.partial(self._question, record, answer))
            if not ids or len(ids) + len(more) + 2 <= spec.text_length:
                ids += more
        return np.array([spec.tokenizer.bos, *ids, spec.tokenizer.eos], np.int32)

    def _question(self, record: Record, answer: str) -> list[int]:
        """Tokenises a question with its answer, without <BOS> and <EOS>."""
        prompt = question_prompt(record.fields, self._context.spec.dataset)
        tokens: list[int] = question_tokens(prompt, answer, self._context.spec.tokenizer).tolist()
        return tokens[1:-1]
