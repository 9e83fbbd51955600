"""Makes rows without visuals: pieces of text documents, or questions and answers as text."""

import functools
from collections.abc import Callable, Sequence

from data_pipelines.readers import PendingBatch
from data_pipelines.records import DamagedError
from data_pipelines.row_context import RowContext
from data_pipelines.row_plans import PlannedRow
from data_pipelines.transforms.examples import (
    Arrays,
    Segment,
    answer_of,
    empty_segment,
    question_prompt,
    strings,
    text_segment,
)
from flamingo_jax.processing.sequences import question_tokens, text_tokens


class TextRows:
    """Makes a process's rows of text."""

    def __init__(self, context: RowContext):
        self._context = context

    def begin(self, batch: PendingBatch, rows: Sequence[PlannedRow]) -> Callable[[], Arrays]:
        """Adds a task per row to the batch; returns the function that finishes the batch."""
        segments: list[list[Segment]] = [[] for _ in rows]

        def make(number: int) -> None:
            row = rows[number]
            self._context.failures.saw(self._context.plans.records_in([row]))
            segments[number] = [self._segment(item, row.epoch) for item in row.items]

        for number in range(len(rows)):
            batch.add(functools.partial(make, number))
        return lambda: self._context.assemble(segments)

    def _segment(self, item: int, epoch: int) -> Segment:
        """Tokenises an item's record, or takes its cached tokens, and cuts out the item."""
        context, dataset = self._context, self._context.spec.dataset
        tokenizer, items = context.spec.tokenizer, context.plans.items
        place, length = int(items.record[item]), int(items.length[item])
        record = context.records[place]
        try:
            context.require_whole(place, record)
            if dataset.kind == "questions":
                answer = answer_of(record.fields, context.random(epoch, record.id))
                document = record.cached(
                    answer,
                    lambda: question_tokens(
                        question_prompt(record.fields, dataset), answer, tokenizer
                    ),
                )
            else:
                document = record.cached(
                    "", lambda: text_tokens(strings([record.fields["text"]])[0], tokenizer)
                )
        except DamagedError as error:
            context.failures.add(record.id, error)
            return empty_segment(length, tokenizer.pad)
        context.require_length(place, record, len(document), None)
        if dataset.kind == "questions":
            return text_segment(document, 0, len(document))
        return text_segment(document, int(items.start[item]), length)
