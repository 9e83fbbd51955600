"""Cuts long documents: a window of a page with its first images (paper A.3.1), and a long text
into pieces.
"""

from typing import NamedTuple

import numpy as np

from flamingo_jax.processing.sequences import Look, TokenSequence, media_index


class Window(NamedTuple):
    """A contiguous part of a page.

    tokens: int32 [n].
    loss_mask: bool [n], True where a token is a prediction target.
    media_index: int32 [n], the index into `visuals` that a token attends to, -1 for none.
    visuals: which of the page's visuals are in the window, at most N.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    media_index: np.ndarray
    visuals: range


def window(sequence: TokenSequence, start: int, length: int, visuals: int, look: Look) -> Window:
    """Cuts tokens start..start + length out of a page, with the first `visuals` images whose
    tags begin in them.

    A token whose image lies outside the window, or is not among its first `visuals`, attends
    to none. The first token is input only, not a target.
    """
    part = slice(start, start + length)
    tokens, chunk, loss_mask = (
        sequence.tokens[part],
        sequence.chunk[part],
        sequence.is_text[part].copy(),
    )
    loss_mask[0] = False
    first, last = int(sequence.chunk[start - 1]) if start else 0, int(chunk[-1])
    if first == last:  # No image tag in the window: the usual case in long texts, and fast.
        return Window(tokens, loss_mask, np.full(len(tokens), -1, np.int32), range(0))
    taken = range(first, min(last, first + visuals))
    within = media_index(chunk, int(sequence.chunk[-1]), look) - np.int32(first)
    # Read as unsigned, a negative index is also >= len(taken): one comparison for both ends.
    within[within.view(np.uint32) >= len(taken)] = -1
    return Window(tokens, loss_mask, within, taken)


def text_pieces(tokens: int, length: int) -> list[tuple[int, int]]:
    """Splits a text of `tokens` tokens into pieces (start, length) of at most `length` tokens.

    Consecutive pieces overlap by one token: the last of a piece is the first of the next,
    where it is input only. So each token but <BOS> is a target exactly once.
    """
    if tokens <= length:
        return [(0, tokens)]
    return [(start, min(length, tokens - start)) for start in range(0, tokens - 1, length - 1)]
