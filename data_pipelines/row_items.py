"""The items that are packed into rows: records or parts of them, with their tokens and
visuals.
"""

import dataclasses

import numpy as np

from data_pipelines.transforms.lengths import Lengths
from data_pipelines.transforms.windows import text_pieces
from flamingo_jax.experiment import DatasetConfig


@dataclasses.dataclass(frozen=True)
class RowItems:
    """The items of a dataset, as columns int32 [items].

    record: the item's record, or the first of several.
    start: the token at which a piece of a long text starts; 0 for others.
    length: tokens. visuals: images or clips.
    count: records in the item; more than 1 only for questions about the same visual.
    """

    record: np.ndarray
    start: np.ndarray
    length: np.ndarray
    visuals: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, lengths: Lengths, dataset: DatasetConfig) -> "RowItems":
        """Makes the items of a dataset: a page gives one window, a pair or clip one item
        truncated to a row, a text all of its pieces. Questions are never truncated.
        """
        if dataset.kind == "questions" and dataset.pack:
            return cls._sharing(lengths, dataset.max_length)
        records = np.arange(len(lengths.tokens), dtype=np.int32)
        ones = np.ones_like(records)
        if dataset.kind != "text":
            visuals = (
                np.minimum(lengths.visuals, dataset.visuals)
                if dataset.kind == "pages"
                else lengths.visuals
            )
            tokens = (
                lengths.tokens
                if dataset.kind == "questions"
                else np.minimum(lengths.tokens, dataset.max_length)
            )
            return cls(records, np.zeros_like(records), tokens, visuals, ones)
        cut = [
            (record, *piece)
            for record, tokens in enumerate(lengths.tokens.tolist())
            for piece in text_pieces(tokens, dataset.max_length)
        ]
        record, start, length = np.array(cut, np.int32).reshape(-1, 3).T
        return cls(record, start, length, np.zeros_like(record), np.ones_like(record))

    @classmethod
    def one_each(cls, records: int) -> "RowItems":
        """Makes one item per record, of nominal length 1, for rows that are not packed."""
        ones = np.ones(records, np.int32)
        zeros = np.zeros_like(ones)
        return cls(np.arange(records, dtype=np.int32), zeros, ones, zeros, ones)

    @classmethod
    def by_visual(cls, lengths: Lengths) -> "RowItems":
        """Makes one item per visual, with all consecutive questions about it (contrastive)."""
        first = np.flatnonzero(~lengths.same).astype(np.int32)
        count = np.diff(np.append(first, len(lengths.same))).astype(np.int32)
        return cls(first, np.zeros_like(first), np.ones_like(first), np.zeros_like(first), count)

    @classmethod
    def _sharing(cls, lengths: Lengths, row_length: int) -> "RowItems":
        """Groups consecutive questions about the same visual into as few and as equal items as
        fit a row; each item shows the visual once.
        """
        starts = np.flatnonzero(~lengths.same)
        found: list[tuple[int, int, int]] = []
        for first, run in zip(starts.tolist(), np.split(lengths.tokens, starts[1:]), strict=True):
            whole = int(run.sum())
            enough = whole / -(-whole // row_length)  # Tokens of each of the equal items.
            size = count = 0
            for place, tokens in enumerate(run.tolist(), start=first):
                if count and (size >= enough or size + tokens > row_length):
                    found.append((place - count, size, count))
                    size = count = 0
                size, count = size + tokens, count + 1
            found.append((first + len(run) - count, size, count))
        record, length, count_of = np.array(found, np.int32).reshape(-1, 3).T
        return cls(record, np.zeros_like(record), length, np.ones_like(record), count_of)
