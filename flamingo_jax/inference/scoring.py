"""Scores candidate answers by log-likelihood (the paper's close-ended tasks). A prompt is read
once, and every token that candidates share once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax.inference.candidates import CandidateTree, TreePart
from flamingo_jax.inference.prefill import DecodingModel, Prefilled
from flamingo_jax.inference.prompts import next_power
from flamingo_jax.models.cache import Branches

Array = jax.Array


class TreeArrays(NamedTuple):
    """One part of each prompt's tree of candidates, padded to n tokens and e next tokens.

    tokens, depths, ends: int32 [B, n], see `TreePart`.
    sources, targets: int32 [B, e].
    """

    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    sources: np.ndarray
    targets: np.ndarray


def next_log_probabilities(
    model: DecodingModel, prefilled: Prefilled, media: Any, tree: TreeArrays
) -> Array:
    """Computes the log-probabilities of the tree's next tokens after their prompts, float32
    [B, e].

    media: of `Flamingo.prepare_media`; None without visuals.
    """
    # The tree's first token is the prompt's last, which prefill left out.
    tokens = jnp.asarray(tree.tokens).at[:, 0].set(prefilled.last)
    logits, _ = model.decode(
        tokens,
        prefilled.position[:, None] + tree.depths,
        jnp.broadcast_to(prefilled.media_index[:, None], tokens.shape),
        media,
        prefilled.visuals,
        prefilled.cache,
        Branches(prefilled.position, jnp.asarray(tree.ends)),
    )
    row = jnp.arange(tokens.shape[0])[:, None]
    # Not log_softmax of everything: that would be a second array of logits' size.
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    return logits[row, tree.sources, tree.targets] - normaliser[row, tree.sources]


def tree_arrays(trees: Sequence[CandidateTree], rows: int) -> list[TreeArrays]:
    """Turns the trees of a batch's prompts into one `TreeArrays` of `rows` rows per part."""
    parts = [part for tree in trees for part in tree.parts]
    length = tree_length(max(len(part.tokens) for part in parts))
    most = next_power(2, max(len(part.targets) for part in parts))
    # Padding: for a tree of fewer parts than others, and for rows without a prompt.
    nothing = TreePart(*[np.zeros(0, np.int32)] * 5)
    return [
        _stack(
            [tree.parts[place] if place < len(tree.parts) else nothing for tree in trees],
            rows,
            length,
            most,
        )
        for place in range(max(len(tree.parts) for tree in trees))
    ]


def tree_length(count: int) -> int:
    """Rounds a number of tokens up to one of 1, 2, 4, 8, 16, 32, 64, 96, 128, ...: few shapes to
    compile, little padding.
    """
    return next_power(2, count) if count <= 32 else -(-count // 32) * 32


def _stack(parts: Sequence[TreePart], rows: int, length: int, most: int) -> TreeArrays:
    tokens, depths = np.zeros((2, rows, length), np.int32)
    # A padding token is its own subtree: it attends to itself and the prompt.
    ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
    sources, targets = np.zeros((2, rows, most), np.int32)
    for row, part in enumerate(parts):
        size, wanted = len(part.tokens), len(part.targets)
        tokens[row, :size], depths[row, :size], ends[row, :size] = (
            part.tokens,
            part.depths,
            part.ends,
        )
        sources[row, :wanted], targets[row, :wanted] = part.sources, part.targets
    return TreeArrays(tokens, depths, ends, sources, targets)
