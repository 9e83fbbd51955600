"""A benchmark in one line: KIND:NAME=DATASET[:SPLIT][,support=DATASET[:SPLIT]]."""

import re
from typing import NamedTuple

from flamingo_jax.errors import UserError

KINDS = ("captioning", "vqa", "classification", "binding")


class BenchmarkDescription(NamedTuple):
    """A benchmark's kind and name, and where its queries and its support examples are."""

    kind: str
    name: str
    path: str
    split: str
    support_path: str
    support_split: str
    names_support: bool
    """Whether the description itself says where support examples are."""

    @classmethod
    def parse(cls, text: str) -> "BenchmarkDescription":
        """Reads a description; by default queries are the split `test`, and support examples
        the split `train` of the same dataset.

        Raises: UserError where it is not of the form.
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
    """Reads numbers of shots as a flag has them; raises UserError for what is no number."""
    if texts is None:
        return default
    try:
        shots = [int(text) for text in texts]
    except ValueError as error:
        raise UserError(
            f"--shots={','.join(texts)} must be numbers with commas between them, as in 0,4,8"
        ) from error
    if not shots or min(shots) < 0:
        raise UserError(f"--shots={','.join(texts)} must be numbers from 0 up")
    return shots
