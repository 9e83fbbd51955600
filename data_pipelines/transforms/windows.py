"""Stretches of a long document: a page's window with its first images (paper A.3.1), and the
pieces of a long text.
"""

from typing import NamedTuple

import numpy as np

from flamingo_jax.processing.sequences import Look, TokenSequence, media_index


class Window(NamedTuple):
    """A stretch of a page. tokens int32 [n], loss_mask bool [n] (True where a token is a
    target), media_index int32 [n] (place within `visuals`, -1 for none), visuals: which of the
    page's visuals are in it, at most N.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    media_index: np.ndarray
    visuals: range


def window(sequence: TokenSequence, start: int, length: int, visuals: int, look: Look) -> Window:
    """Cuts tokens start..start + length of a page with the first `visuals` images whose tags
    begin among them.

    Tokens that would look at an image before the window, behind it, or past the first `visuals`
    in it look at none. The first token is no
    target: nothing stands before it.
    """
    part = slice(start, start + length)
    tokens, chunk, loss_mask = (
        sequence.tokens[part],
        sequence.chunk[part],
        sequence.is_text[part].copy(),
    )
    loss_mask[0] = False
    first, last = int(sequence.chunk[start - 1]) if start else 0, int(chunk[-1])
    if first == last:  # The most of a long text has no image in sight.
        return Window(tokens, loss_mask, np.full(len(tokens), -1, np.int32), range(0))
    taken = range(first, min(last, first + visuals))
    within = media_index(chunk, int(sequence.chunk[-1]), look) - np.int32(first)
    # Without a sign, what is below 0 is past them too.
    within[within.view(np.uint32) >= len(taken)] = -1
    return Window(tokens, loss_mask, within, taken)


def text_pieces(tokens: int, length: int) -> list[tuple[int, int]]:
    """Returns (start, length) of the pieces of a text of so many tokens, none longer than
    `length`.

    Neighbours share one token: the last of a piece is the first, unpredicted one of the next,
    so every token but <BOS> is a target once.
    """
    if tokens <= length:
        return [(0, tokens)]
    return [(start, min(length, tokens - start)) for start in range(0, tokens - 1, length - 1)]
