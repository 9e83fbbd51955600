"""Measures how many tokens and visuals each record has, once per dataset and tokenizer.

Rows are packed from these lengths alone, without reading the records; they are saved beside
the dataset.
"""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
import uuid
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.features import is_current
from data_pipelines.records import UNREADABLE
from data_pipelines.transforms.examples import strings
from data_pipelines.transforms.randomness import generator
from flamingo_jax.processing.sequences import (
    fill_prompt,
    page_sequence,
    pair_overhead,
    question_sequence,
)
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.progress import Bar
from flamingo_jax.storage import read_with_retries

LONG = 5_000
"""A progress bar is shown from this many records on."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of all records of a split, as columns.

    tokens: int32 [records], tokens of the whole sequence including special tokens; the maximum
      over a record's captions (with or without a leading space) or answers.
    visuals: int32 [records], images or clips.
    captions: int32 [captions, 2], tokens of the sequence with each caption, without and with a
      leading space; all records' captions one after the other.
    first: int64 [records + 1], record i's captions are captions[first[i]:first[i + 1]].
    same: bool [records], True for a question with the same visual as the question before it.
    damaged: bool [records], True where the record was damaged on disk; its other columns are
      then those of a blank record.
    """

    tokens: np.ndarray
    visuals: np.ndarray
    captions: np.ndarray
    first: np.ndarray
    same: np.ndarray
    damaged: np.ndarray

    def of_record(self, place: int, caption: tuple[int, bool] | None) -> int:
        """Returns the tokens of a record's sequence with a (caption, leading space) choice; of
        its longest sequence for None.
        """
        if caption is None or self.first[place] == self.first[place + 1]:
            return int(self.tokens[place])
        return int(self.captions[self.first[place] + caption[0], int(caption[1])])

    def whole(self, records: int) -> bool:
        """Returns whether the columns are consistent and have `records` rows."""
        return (
            all(
                len(values) == records
                for values in (self.tokens, self.visuals, self.same, self.damaged)
            )
            and self.first.shape == (records + 1,)
            and self.captions.shape == (self.first[-1], 2)
        )

    def of(self, choices: "CaptionChoices") -> np.ndarray:
        """Returns int32 [records], tokens of the sequences with these captions."""
        if not len(self.captions):
            return self.tokens
        # A record without captions has no index of its own: read any, and ignore it below.
        chosen = self.captions[
            np.minimum(self.first[:-1] + choices.caption, len(self.captions) - 1),
            choices.space.astype(int),
        ]
        return np.where(np.diff(self.first) > 0, chosen, self.tokens)

    def choose(
        self, leading_space: float, seed: int, epoch: int, dataset: str = ""
    ) -> "CaptionChoices":
        """Draws a caption for each record in an epoch, with a leading space at probability
        `leading_space` (paper A.3.3).

        dataset: its name in the config, part of the key of the random draws.
        """
        rng = generator("captions", seed, dataset, epoch)
        records = len(self.tokens)
        caption = (rng.random(records) * np.diff(self.first)).astype(np.int32)
        return CaptionChoices(caption, rng.random(records) < leading_space)

    def first_captions(self) -> "CaptionChoices":
        """Chooses each record's first caption without a leading space, as evaluation does."""
        return CaptionChoices(
            np.zeros(len(self.tokens), np.int32), np.zeros(len(self.tokens), bool)
        )


class CaptionChoices(NamedTuple):
    """The caption that each record shows in an epoch.

    caption: int32 [records], its index among the record's captions.
    space: bool [records], whether a space is put before it.
    """

    caption: np.ndarray
    space: np.ndarray


def measure(
    records: Sequence[Any],
    kind: str,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    title: str = "lengths",
) -> Lengths:
    """Measures records by reading and tokenising each once.

    prompt: the dataset's prompt for questions, which counts towards their tokens.
    """
    tokens = np.zeros(len(records), np.int32)
    visuals = np.zeros(len(records), np.int32)
    captions: list[tuple[int, int]] = []
    first = np.zeros(len(records) + 1, np.int64)
    same, damaged = np.zeros(len(records), bool), np.zeros(len(records), bool)
    before: list[Any] = []
    with Bar(title, len(records), enabled=len(records) >= LONG) as bar:
        for place in range(len(records)):
            record = records[place]
            damaged[place] = UNREADABLE in record
            if kind in ("pairs", "videos"):
                lengths = _captions(record, tokenizer)
                captions += lengths
                tokens[place], visuals[place] = (
                    max((max(both) for both in lengths), default=pair_overhead(tokenizer)),
                    1,
                )
            else:
                tokens[place], visuals[place] = _of(record, kind, tokenizer, prompt)
            if kind == "questions":
                frames = list(record["frames"])
                same[place], before = bool(frames) and frames == before, frames
            first[place + 1] = len(captions)
            bar.advance()
    return Lengths(
        tokens, visuals, np.array(captions, np.int32).reshape(-1, 2), first, same, damaged
    )


def load_or_measure(
    records: Sequence[Any],
    kind: str,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    split: str,
    prompt: str = "",
) -> Lengths:
    """Loads the lengths from `lengths_<fingerprint>_<split>.npz` in the dataset's folder, or
    measures them and saves them there.

    They are measured again where the file is missing, damaged or older than the dataset, or
    where a record that was damaged has been repaired since. The file name also has a digest of
    the prompt for questions. In a read-only folder they are measured each time.

    Raises: StorageError where the storage keeps failing (`storage.read_with_retries`).
    """
    prompt_digest = (
        f"_{hashlib.sha256(prompt.encode()).hexdigest()[:16]}" if kind == "questions" else ""
    )
    path = folder / f"lengths_{tokenizer.fingerprint}{prompt_digest}_{split}.npz"
    if is_current(path, folder):
        lengths = _load(path, len(records))
        if lengths is not None and all(
            UNREADABLE in records[place] for place in np.flatnonzero(lengths.damaged).tolist()
        ):
            return lengths
    lengths = measure(
        records, kind, tokenizer, prompt, title=f"token lengths of {folder.parent.name} {split}"
    )
    # Written under another name and renamed: other processes never see half a file.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.npz")
    try:
        np.savez(temporary, **dataclasses.asdict(lengths))
        temporary.replace(path)
    except OSError as error:
        logging.info("%s is not kept, it will be measured again next time: %s", path.name, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
    return lengths


def _load(path: pathlib.Path, records: int) -> Lengths | None:
    """Reads saved lengths; None where the file is damaged or not of `records` records."""

    def load() -> Lengths:
        with np.load(path) as stored:
            return Lengths(*(stored[field.name] for field in dataclasses.fields(Lengths)))

    try:
        lengths = read_with_retries(load, path)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logging.warning("%s cannot be used and is made anew: %s", path, error)
        return None
    return lengths if lengths.whole(records) else None


def _of(record: Any, kind: str, tokenizer: Tokenizer, prompt: str) -> tuple[int, int]:
    """Returns (tokens, visuals) of a page, a question or a text."""
    if kind == "pages":
        texts = strings(record["texts"])
        return len(page_sequence(texts, tokenizer)), len(texts) - 1
    if kind == "questions":
        opening = fill_prompt(prompt, *strings([record["question"]]))
        return (
            max(
                len(question_sequence(opening, answer, tokenizer))
                for answer in strings(record["answers"]) or [""]
            ),
            1,
        )
    return 2 + len(tokenizer.encode(*strings([record["text"]]))), 0


def _captions(record: Any, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Returns the sequence's tokens with each caption: (without, with a leading space)."""
    overhead = pair_overhead(tokenizer)
    tokens = [
        [len(tokenizer.encode(text)) for text in (caption, " " + caption)]
        for caption in strings(record["captions"])
    ]
    return [(overhead + bare, overhead + spaced) for bare, spaced in tokens]
