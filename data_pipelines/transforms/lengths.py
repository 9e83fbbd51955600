"""How many tokens and visuals every record has: measured once per tokenizer, kept beside the dataset."""

import contextlib
import dataclasses
import logging
import pathlib
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.features import is_current
from data_pipelines.transforms.examples import strings
from flamingo_jax.processing.sequences import page_sequence, pair_overhead
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.progress import Bar

LONG = 5_000
"""Records from which on measuring shows a progress bar."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """tokens, visuals: int32 [records]. Tokens are those of the whole sequence, specials included; of a record with several captions,
    those of the longest, with or without a leading space."""

    tokens: np.ndarray
    visuals: np.ndarray


def measure(records: Sequence[Any], kind: str, tokenizer: Tokenizer, *, title: str = "lengths") -> Lengths:
    """Reads every record once."""
    tokens = np.zeros(len(records), np.int32)
    visuals = np.zeros(len(records), np.int32)
    with Bar(title, len(records), enabled=len(records) >= LONG) as bar:
        for place in range(len(records)):
            tokens[place], visuals[place] = _of(records[place], kind, tokenizer)
            bar.advance()
    return Lengths(tokens, visuals)


def load_or_measure(records: Sequence[Any], kind: str, tokenizer: Tokenizer, folder: pathlib.Path, split: str) -> Lengths:
    """From `lengths_<fingerprint>_<split>.npz` in the dataset's folder, written there first where it is missing or older than the
    dataset. A folder that cannot be written to is measured each time."""
    path = folder / f"lengths_{tokenizer.fingerprint}_{split}.npz"
    if is_current(path, folder):
        try:
            with np.load(path) as stored:
                lengths = Lengths(stored["tokens"], stored["visuals"])
            if len(lengths.tokens) == len(records):
                return lengths
        except (OSError, ValueError, KeyError, EOFError) as error:
            logging.warning("%s cannot be read and is made anew: %s", path, error)
    lengths = measure(records, kind, tokenizer, title=f"token lengths of {folder.parent.name} {split}")
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.npz")
    try:
        np.savez(temporary, tokens=lengths.tokens, visuals=lengths.visuals)
        temporary.replace(path)
    except OSError as error:
        logging.info("%s is not kept, it will be measured again next time: %s", path.name, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
    return lengths


def _of(record: Any, kind: str, tokenizer: Tokenizer) -> tuple[int, int]:
    if kind == "pages":
        texts = strings(record["texts"])
        return len(page_sequence(texts, tokenizer)), len(texts) - 1
    if kind == "text":
        return 2 + len(tokenizer.encode(*strings([record["text"]]))), 0
    both = (len(tokenizer.encode(space + caption)) for caption in strings(record["captions"]) for space in ("", " "))
    return pair_overhead(tokenizer) + max(both, default=0), 1
