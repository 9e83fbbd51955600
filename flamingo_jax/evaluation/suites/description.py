"""Parses the flags of `launch.evaluate` that describe a benchmark,
KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]], and its numbers of shots.
"""

import re
from typing import NamedTuple

from flamingo_jax.errors import UserError

KINDS = ("captioning", "vqa", "classification", "binding")


class BenchmarkDescription(NamedTuple):
    """A benchmark's kind and name, and the datasets of its queries and support."""

    kind: str
    name: str
    path: str
    split: str
    support_path: str
    support_split: str
    names_support: bool
    """Whether the flag had `support=`."""

    @classmethod
    def parse(cls, text: str) -> "BenchmarkDescription":
        """Parses a description. By default queries are the split `test`, and support examples
        the split `train` of the same dataset.

        Raises: UserError where the text does not have the form above.
        """
        match = re.fullmatch(r"(\w+):([^=]+)=([^,]+?)(?:,support=([^,]+))?", text)
        if not match or match[1] not in KINDS:
            raise UserError(
                f"--benchmark={text} must be KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]]"
                f" with KIND one of {', '.join(KINDS)}"
            )
        kind, name, place, support = match.groups()
        path, _, split = place.partition(":")
        support_path, _, support_split = (support or path).partition(":")
        return cls(
            kind,
            name,
            path,
            split or "test",
            support_path,
            support_split or "train",
            bool(support),
        )


def parse_shots(texts: list[str] | None, default: list[int]) -> list[int]:
    """Parses the values of --shots; `default` where the flag was not given.

    Raises: UserError for a value that is not a number from 0 up.
    """
    return parse_numbers("shots", texts, default)


def parse_numbers(flag: str, texts: list[str] | None, default: list[int]) -> list[int]:
    """Parses the numbers of a flag; `default` where it was not given.

    Raises: UserError for a value that is not a number from 0 up.
    """
    if texts is None:
        return default
    try:
        numbers = [int(text) for text in texts]
    except ValueError as error:
        raise UserError(
            f"--{flag}={','.join(texts)} must be numbers with commas between them, as in 0,4,8"
        ) from error
    if not numbers or min(numbers) < 0:
        raise UserError(f"--{flag}={','.join(texts)} must be numbers from 0 up")
    return numbers
