"""Packing: rows of several datasets as one stream of tokens, so that each weight is multiplied
with all of them in one matrix product.

A stream [S, T, ...] has one row for each of the S shards of the batch axis (`row_shards`): all
tokens of that shard, dataset after dataset. Joining and splitting therefore move nothing
between devices. The rows of a single dataset, [B, L, ...], are a stream without any change.

Models compute on streams. Only attention needs to know which tokens belong to one row, and
gets it from one of two small objects: `Packing` for self-attention, within rows, and
`MediaView` for cross-attention, from rows to their visuals. Both offer `over_rows`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax.partitioning.constraints import row_shards

Array = jax.Array
Parts = Sequence[Array]
"""One array for each dataset."""
Attend = Callable[[Array, Array, Array, Array], Array]
"""(query, key, value, segments or mask) -> attention output, shaped as the query."""


class PackedText(NamedTuple):
    """Packed rows of one dataset.

    tokens, positions: int32 [B, L]; positions count from 0 within each segment.
    segments: int32 [B, L], which packed example a token belongs to; 0 is padding.
    media_index: int32 [B, L], the paper's phi: which of the row's visuals a token attends to,
      an index into `visuals`; -1 for none. None for text-only data.
    visuals: int32 [B, N], each row's visuals as indices into the batch's images; -1 for none.
      None for text-only data.
    """

    tokens: Array
    positions: Array
    segments: Array
    media_index: Array | None = None
    visuals: Array | None = None


class Packing(NamedTuple):
    """The rows that a stream is made of, for self-attention.

    segments: int32 [B_p, L_p] for each part p (a dataset, or several merged); 0 is padding.
    """

    segments: tuple[Array, ...]

    def over_rows(self, attend: Attend, query: Array, key: Array, value: Array) -> Array:
        """Applies `attend(query, key, value, segments)` to the rows of a stream [S, T, H, d]
        -> [S, T, H, d].

        `attend` gets [B, L, H, d] and int32 [B, L], once for each row length.
        """
        shapes = shapes_of(self.segments)
        if length := block_length(shapes):
            # Short rows side by side in blocks of the longest row's length: one call for all
            # parts, without slicing and concatenating the stream. Distinct segment numbers
            # keep the rows of a block apart.
            arrays = (query, key, value, block_segments(self.segments))
            # [S, T, ...] -> [S * T / length, length, ...]
            blocks = (a.reshape(-1, length, *a.shape[2:]) for a in arrays)
            return attend(*blocks).reshape(query.shape)
        parts = (split(a, shapes) for a in (query, key, value))
        return join([attend(*row) for row in zip(*parts, self.segments, strict=True)])


class TokenStream(NamedTuple):
    """The packed rows of several datasets as the one stream that models read.

    tokens, positions: int32 [S, T].
    texts: the stream's parts: the datasets, adjacent ones of equal shape merged.
    joined: whether several datasets were merged into a single part. The stream is then that
      part's rows [B, L], and `restore` brings results back to [S, T].
    """

    tokens: Array
    positions: Array
    packing: Packing
    texts: list[PackedText]
    joined: bool

    def restore(self, x: Array) -> Array:
        """Reshapes a model's output from the merged rows [B, L, ...] to the datasets' stream
        [S, T, ...].
        """
        return x.reshape(row_shards(), -1, *x.shape[2:]) if self.joined else x


def pack(texts: Sequence[PackedText]) -> TokenStream:
    """Concatenates the packed rows of several datasets into one token stream."""
    merged = merge_alike(texts)
    return TokenStream(
        join([text.tokens for text in merged]),
        join([text.positions for text in merged]),
        Packing(tuple(text.segments for text in merged)),
        merged,
        len(texts) > len(merged) == 1,
    )


class MediaView(NamedTuple):
    """The cross-attention masks of a stream: which visual tokens each text token attends to.

    masks: bool [B_p, 1, L_p, N_p * R] for each part p, whose rows have N_p visuals of R tokens
      each; N_p is 0 for text-only data.
    visuals: int32 [B, N], for a stream of a single part: the rows' visuals as indices into all
      M. None where row b's visual n is number b * N + n, so that no gather is needed (the
      gradient of a gather is a scatter, slow on every backend).
    text_masks: bool [B_p, 1, L_p, S_p], the text tokens of its row that each token also
      attends to (`text_window`); empty without a window.
    """

    masks: tuple[Array, ...]
    visuals: Array | None = None
    text_masks: tuple[Array, ...] = ()

    def over_rows(
        self,
        attend: Attend,
        query: Array,
        key: Array,
        value: Array,
        text: tuple[Array, Array] | None = None,
    ) -> Array:
        """Applies `attend(query, key, value, mask)` from each row's tokens to its visuals;
        zeros for text-only data.

        Args:
          query: the stream's [S, T, H, d].
          key, value: the visuals' [S, V, R, H, d] or [M, R, H, d].
          text: keys and values of the text that `text_masks` belong to: the stream's
            [S, T, H, d], or a decoding cache's [B, S, H, d].

        Returns: [S, T, H, d].
        """
        if self.visuals is not None:
            # [M, R, H, d] -> [B, N, R, H, d]
            key, value = key[self.visuals], value[self.visuals]
        # (B_p, N_p) and (B_p, L_p) of every part.
        owned = [(m.shape[0], m.shape[-1] // key.shape[-3]) for m in self.masks]
        queries = split(query, [(m.shape[0], m.shape[2]) for m in self.masks])

        def rows(q: Array, k: Array, v: Array, mask: Array, *text: Array) -> Array:
            """Attends from one part's tokens to its visuals, and to `text` with its mask."""
            if not mask.shape[-1]:
                return jnp.zeros_like(q)
            # [B, N, R, H, d] -> [B, N * R, H, d]
            k, v = (a.reshape(q.shape[0], -1, *a.shape[-2:]) for a in (k, v))
            if text:
                # Text keys behind the visual ones: [B, N * R + S, H, d], one softmax over
                # both.
                both = zip((k, v, mask), text, (1, 1, -1), strict=True)
                k, v, mask = (jnp.concatenate([a, b], axis) for a, b, axis in both)
            return attend(q, k, v, mask)

        parts: list[Parts] = [queries, split(key, owned), split(value, owned), self.masks]
        if text is not None:
            shapes = [(m.shape[0], m.shape[-1]) for m in self.text_masks]
            parts += [split(a, shapes) for a in text] + [self.text_masks]
        return join([rows(*part) for part in zip(*parts, strict=True)])


def merge_alike(texts: Sequence[PackedText]) -> list[PackedText]:
    """Merges adjacent datasets whose rows have equal numbers of tokens and of visuals: the
    same stream in fewer, larger parts.
    """

    def shape(text: PackedText) -> list[int | None]:
        return [None if a is None else a.shape[1] for a in text]

    def merge(*arrays: Array) -> Array:
        return join(arrays).reshape(-1, *arrays[0].shape[1:])

    return [jax.tree.map(merge, *alike) for _, alike in itertools.groupby(texts, shape)]


def join(parts: Parts, groups: int | None = None) -> Array:
    """Concatenates parts [B_p, L_p, ...] along tokens -> a stream [S, T, ...]; a single part
    stays as it is. groups: S, by default `row_shards()`.
    """
    if len(parts) == 1:
        return parts[0]
    groups = groups or row_shards()
    return jnp.concatenate([part.reshape(groups, -1, *part.shape[2:]) for part in parts], axis=1)


def split(stream: Array, shapes: Sequence[tuple[int, int]]) -> list[Array]:
    """Splits a stream [S, T, ...] into its parts [B_p, L_p, ...]: the inverse of `join`.

    shapes: (B_p, L_p) of every part.
    """
    if len(shapes) == 1:
        return [stream]
    found, start = [], 0
    for rows, length in shapes:
        count = rows * length // stream.shape[0]
        found.append(
            jax.lax.slice_in_dim(stream, start, start + count, axis=1).reshape(
                rows, length, *stream.shape[2:]
            )
        )
        start += count
    return found


def block_length(shapes: Sequence[tuple[int, int]]) -> int | None:
    """Returns the length of the equal blocks into which a stream can be cut so that no row
    crosses a block's edge: the longest row's length.

    None for a single part, for rows that do not align, and where attention within blocks would
    compute more than twice as many scores as attention within rows.

    shapes: (B_p, L_p) of every part.
    """
    shards, longest = row_shards(), max(length for _, length in shapes)
    counts = [rows * length // shards for rows, length in shapes]
    starts = [sum(counts[:place]) for place in range(len(counts))]
    aligned = sum(counts) % longest == 0 and all(
        longest % length == 0 and start % length == 0
        for start, (_, length) in zip(starts, shapes, strict=True)
    )
    # Scores of attention within rows; within blocks they are tokens * longest.
    needed = sum(count * length for count, (_, length) in zip(counts, shapes, strict=True))
    return longest if len(shapes) > 1 and aligned and sum(counts) * longest <= 2 * needed else None


def block_segments(segments: Parts) -> Array:
    """Renumbers the segments of every part, int32 [B_p, L_p], so that no two rows of a shard
    share a number -> [S, T]; padding stays 0.

    A row of L tokens has at most L segments and gets the next L numbers, so that the largest
    number is at most the shard's token count.
    Raises: ValueError where that exceeds int32.
    """
    found, first = [], 0
    for part in segments:
        rows, length = part.shape[0] // row_shards(), part.shape[1]
        last = first + rows * length
        if last > np.iinfo(np.int32).max:
            raise ValueError(f"{last:,} tokens on one device are more than 32 bits can number")
        before = first + jnp.arange(part.shape[0])[:, None] % rows * length
        found.append(jnp.where(part > 0, before + part, 0))
        first = last
    return join(found)


def shapes_of(parts: Parts) -> list[tuple[int, int]]:
    """Returns (B_p, L_p) of every part."""
    return [(part.shape[0], part.shape[1]) for part in parts]
