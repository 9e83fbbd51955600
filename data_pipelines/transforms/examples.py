"""Converts records to token segments and joins segments into packed rows.

Everything random about an example is keyed by (seed, dataset, epoch, record id), so a row is
the same on whichever process and thread it is made.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_pipelines.transforms import augmentation
from data_pipelines.transforms.randomness import RecordRandom
from data_pipelines.transforms.windows import Window, window
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.processing import sequences
from flamingo_jax.processing.text import text_of
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.video import clip

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Segment:
    """One example in a packed row.

    tokens: int32 [n].
    loss_mask: bool [n], True where the token is a prediction target.
    media_index: int32 [n], the index into `visuals` that the token attends to, -1 for none.
    visuals: for each visual, its frames as (visual, frame) indices into the record. Pixels are
      read only when the row is made.
    augment: one entry per visual, or empty for no augmentation.
    shares: has no visuals of its own but attends to the one visual of the previous segment, so
      that several questions about an image encode it once.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    media_index: np.ndarray
    visuals: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)
    augment: list[augmentation.Augmentation | None] = dataclasses.field(default_factory=list)
    shares: bool = False

    def sharing(self) -> "Segment":
        """Returns this segment, attending to the visual of the segment before it."""
        return dataclasses.replace(self, visuals=[], augment=[], shares=True)

    def blank(self) -> "Segment":
        """Returns the same tokens without targets and visuals: the substitute for a damaged
        record, which leaves the layout of the row unchanged.
        """
        return dataclasses.replace(
            self,
            loss_mask=np.zeros_like(self.loss_mask),
            media_index=np.full_like(self.media_index, -1),
            visuals=[],
            augment=[],
        )


def strings(values: Iterable[Any]) -> list[str]:
    """Decodes a record's texts, which TFDS returns as bytes."""
    return [text_of(value) for value in values]


def caption_of(record: Any, rng: RecordRandom | None) -> str:
    """Chooses one of a record's captions; "" where it has none.

    Where rows were packed, the caption and its leading space (paper A.3.3) were chosen at
    planning time and are in `rng.caption`; otherwise a random one, or the first if `rng` is
    None.
    """
    captions = strings(record["captions"])
    if not captions:
        return ""
    if rng is not None and rng.caption is not None:
        place, space = rng.caption
        return " " * space + captions[place]
    return captions[0 if rng is None else rng.below(len(captions))]


def answer_of(record: Any, rng: RecordRandom | None) -> str:
    """Chooses one of a question's answers at random, the first if `rng` is None; "" where it
    has none.
    """
    answers = strings(record["answers"])
    if not answers:
        return ""
    return answers[0 if rng is None else rng.below(len(answers))]


def question_prompt(record: Any, dataset: DatasetConfig) -> str:
    """Fills a record's question into the dataset's prompt."""
    return sequences.fill_prompt(dataset.prompt, strings([record["question"]])[0])


def flamingo_segment(
    record: Any, dataset: DatasetConfig, tokenizer: Tokenizer, rng: RecordRandom | None
) -> Segment:
    """Makes the segment of a page, pair, clip or question.

    Args:
      record: a `records.Record`. Its fields are read only where the result is not cached: a
        page whose window has no image need not be read again.
      rng: the record's randomness; None for the fixed choices of evaluation (first window,
        caption and frames, no augmentation).
    """
    if dataset.kind == "pages":
        sequence = record.cached(
            "", lambda: sequences.page_sequence(strings(record.fields["texts"]), tokenizer)
        )
        part = _page_window(sequence, dataset, rng)
        visuals = [[(place, 0)] for place in part.visuals]
    else:
        choose = answer_of if dataset.kind == "questions" else caption_of
        text = choose(record.fields, rng)
        part = record.cached(text, lambda: _visual_window(record, dataset, tokenizer, text))
        run = clip(record.frame_counts[0], dataset.frames, None if rng is None else rng.below)
        visuals = [[(0, frame) for frame in run]]
    augment = [] if rng is None else [rng.augmentation(dataset) for _ in visuals]
    return Segment(part.tokens, part.loss_mask, part.media_index, visuals, augment)


def text_segment(document: np.ndarray, start: int, length: int) -> Segment:
    """Makes a segment of one of a document's pieces (`windows.text_pieces`)."""
    tokens = document[start : start + length]
    loss_mask = np.ones(len(tokens), bool)
    loss_mask[0] = False  # Nothing precedes it: the first token is input only.
    return Segment(tokens, loss_mask, np.full(len(tokens), -1, np.int32))


def empty_segment(length: int, pad_token: int) -> Segment:
    """Makes a segment of `length` padding tokens without targets and visuals: the substitute
    for a damaged record whose tokens cannot be read.
    """
    nothing = np.zeros(length, np.int32)
    return Segment(np.full_like(nothing, pad_token), nothing.astype(bool), nothing - 1)


def _visual_window(record: Any, dataset: DatasetConfig, tokenizer: Tokenizer, text: str) -> Window:
    """Tokenises a record of one visual: its caption, or its question and answer."""
    length = dataset.max_length
    if dataset.kind == "questions":
        prompt = question_prompt(record.fields, dataset)
        sequence = sequences.question_sequence(prompt, text, tokenizer)
    else:
        sequence = sequences.pair_sequence(text, tokenizer, length=length)
    return window(sequence, 0, length, 1, "previous")


def _page_window(
    sequence: sequences.TokenSequence, dataset: DatasetConfig, rng: RecordRandom | None
) -> Window:
    """Cuts a random window out of a page, the first one if `rng` is None."""
    if rng is None:
        return window(sequence, 0, dataset.max_length, dataset.visuals, "previous")
    # Paper A.3.1: a random window, whose text attends to the next image instead of the
    # previous one with probability p_next.
    look_next = rng.happens(dataset.p_next)
    start = rng.below(max(len(sequence) - dataset.max_length, 0) + 1)
    return window(
        sequence, start, dataset.max_length, dataset.visuals, "next" if look_next else "previous"
    )


def assemble(rows: Sequence[Sequence[Segment]], *, length: int, pad_token: int) -> Arrays:
    """Concatenates each row's segments and pads the rows to `length`.

    Returns:
      tokens: int32 [B, L], `pad_token` at the end of a row.
      positions: int32 [B, L], from 0 in each segment.
      segments: int32 [B, L], the segment's number in its row from 1; 0 is padding.
      loss_mask: bool [B, L].
      media_index: int32 [B, L], an index into all visuals of the row, -1 for none.
    """
    shape, steps = (len(rows), length), np.arange(length, dtype=np.int32)
    tokens, media_index = np.full(shape, pad_token, np.int32), np.full(shape, -1, np.int32)
    positions, numbers, loss_mask = (
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, bool),
    )
    for row, segments in enumerate(rows):
        start = places = 0
        for number, segment in enumerate(segments, start=1):
            count = len(segment.tokens)
            part = row, slice(start, start + count)
            tokens[part], loss_mask[part] = segment.tokens, segment.loss_mask
            positions[part], numbers[part] = steps[:count], number
            # From the segment's own visuals to the row's: shift by the visuals before it.
            first = places - 1 if segment.shares else places
            media_index[part] = (
                np.where(segment.media_index >= 0, segment.media_index + first, -1)
                if first
                else segment.media_index
            )
            start, places = start + count, places + len(segment.visuals)
    return {
        "tokens": tokens,
        "positions": positions,
        "segments": numbers,
        "loss_mask": loss_mask,
        "media_index": media_index,
    }
