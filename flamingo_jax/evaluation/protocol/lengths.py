"""Checks that a benchmark's prompts fit in a model's context before any is asked."""

from collections.abc import Iterable, Sequence

import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.media import MediaRef
from flamingo_jax.evaluation.protocol.asking import Asked
from flamingo_jax.inference.prompts import tokenise
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.visuals import Visual

_BLANK = Visual(np.zeros((1, 1, 1, 3), np.uint8))


def check_lengths(
    name: str, asked: Sequence[Asked], further: int, tokenizer: Tokenizer, most: int
) -> None:
    """Checks the length of every prompt.

    Args:
      name: the benchmark's.
      further: tokens that follow a prompt.
      most: tokens of a prompt and what follows.

    Raises: UserError that names the query with the longest prompt.
    """
    longest, query = 0, ""
    for one in asked:
        # Orders of the same shots have almost the same length.
        parts = [_BLANK if isinstance(part, MediaRef) else part for part in one.prompts[0]]
        count = len(tokenise(parts, tokenizer).tokens)
        if count > longest:
            longest, query = count, one.query.id
    if longest + further > most:
        raise UserError(
            f"{name}'s prompt of the query {query} has {longest} tokens, and {further} are to"
            f" follow, but the model takes {most} in all: ask for fewer shots"
        )


def longest_candidate(candidates: Iterable[str], tokenizer: Tokenizer) -> int:
    """Returns the number of tokens of the longest candidate, with its <EOC>."""
    return 1 + max((len(tokenizer.encode(f" {text}")) for text in candidates), default=0)
