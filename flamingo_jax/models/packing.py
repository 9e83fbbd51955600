"""Packing: rows of several datasets as one stream of tokens, so that a weight meets all of them
in one product.

A stream [S, T, ...] has one row for each of the S groups of devices that share the datasets'
rows: all of the group's tokens, dataset after dataset. Nothing crosses devices when it is
joined or split. Rows of one dataset alone are a stream as they are, [B, L, ...].

Models see streams, and one of two small objects where tokens look at each other: `Packing` for
self-attention, within rows, and `MediaView` for cross-attention, from rows to their visuals.
Both offer `over_rows`; nothing else knows which tokens lie in one row.
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
"""Query, key, value and what says which of them may meet -> what queries found."""


class PackedText(NamedTuple):
    """Packed rows of one dataset. tokens, positions, segments (0 is padding), media_index (phi,
    -1 for none): int32 [B, L]; visuals: int32 [B, N], -1 for none. The last two are None for
    text alone.
    """

    tokens: Array
    positions: Array
    segments: Array
    media_index: Array | None = None
    visuals: Array | None = None


class Packing(NamedTuple):
    """How a stream's tokens lie in rows. segments: int32 [B_p, L_p] of every part, 0 for
    padding.
    """

    segments: tuple[Array, ...]

    def over_rows(self, attend: Attend, query: Array, key: Array, value: Array) -> Array:
        """Calls `attend(query, key, value, segments)` within each row of a stream [S, T, H, d]:
        it sees [B, L, H, d] and int32 [B, L], rows of one length at a time.
        """
        shapes = shapes_of(self.segments)
        if length := block_length(shapes):
            # In one product, and nothing is taken apart and put together again.
            arrays = (query, key, value, block_segments(self.segments))
            blocks = (a.reshape(-1, length, *a.shape[2:]) for a in arrays)
            return attend(*blocks).reshape(query.shape)
        parts = (split(a, shapes) for a in (query, key, value))
        return join([attend(*row) for row in zip(*parts, self.segments, strict=True)])


class TokenStream(NamedTuple):
    """Several datasets' packed rows as models read them: tokens, positions int32 [S, T].

    texts: its parts, neighbours of one shape made one. joined: there were several, and are one
    now, whose rows are the stream.
    """

    tokens: Array
    positions: Array
    packing: Packing
    texts: list[PackedText]
    joined: bool

    def restore(self, x: Array) -> Array:
        """Gives what a model made of the stream the form of the datasets' stream."""
        return x.reshape(row_shards(), -1, *x.shape[2:]) if self.joined else x


def pack(texts: Sequence[PackedText]) -> TokenStream:
    """Makes one stream of the datasets' rows."""
    merged = merge_alike(texts)
    return TokenStream(
        join([text.tokens for text in merged]),
        join([text.positions for text in merged]),
        Packing(tuple(text.segments for text in merged)),
        merged,
        len(texts) > len(merged) == 1,
    )


class MediaView(NamedTuple):
    """What of its visuals each token of a stream sees.

    masks: bool [B_p, 1, L_p, N_p * R] of every part, each row owning N_p visuals of R tokens,
      none in a part of text alone. visuals: int32 [B, N], where the rows of a stream of one part
      find theirs among M; None where row b's lie at b * N + n, so that none need be gathered
      (the gradient of a gather is a scatter, slow on every backend). text_masks: bool [B_p, 1,
      L_p, S_p], which of its row's text tokens each sees beside its visuals; empty for none.
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
        """Calls `attend(query, key, value, mask)` from each row of a stream [S, T, H, d] to its
        visuals, [S, V, R, H, d] or [M, R, H, d]; zeros where a row has none.

        text: keys and values of the rows' text [S, T, H, d], or a cache's [B, S, H, d], which
          `text_masks` are of.
        """
        if self.visuals is not None:
            key, value = key[self.visuals], value[self.visuals]
        owned = [(m.shape[0], m.shape[-1] // key.shape[-3]) for m in self.masks]
        queries = split(query, [(m.shape[0], m.shape[2]) for m in self.masks])

        def rows(q: Array, k: Array, v: Array, mask: Array, *text: Array) -> Array:
            if not mask.shape[-1]:
                return jnp.zeros_like(q)
            k, v = (a.reshape(q.shape[0], -1, *a.shape[-2:]) for a in (k, v))
            if text:
                both = zip((k, v, mask), text, (1, 1, -1), strict=True)
                k, v, mask = (jnp.concatenate([a, b], axis) for a, b, axis in both)
            return attend(q, k, v, mask)

        parts: list[Parts] = [queries, split(key, owned), split(value, owned), self.masks]
        if text is not None:
            shapes = [(m.shape[0], m.shape[-1]) for m in self.text_masks]
            parts += [split(a, shapes) for a in text] + [self.text_masks]
        return join([rows(*part) for part in zip(*parts, strict=True)])


def merge_alike(texts: Sequence[PackedText]) -> list[PackedText]:
    """Merges neighbours in the stream whose rows have as many tokens and visuals: the same stream
    in fewer, larger parts.
    """

    def shape(text: PackedText) -> list[int | None]:
        return [None if a is None else a.shape[1] for a in text]

    def merge(*arrays: Array) -> Array:
        return join(arrays).reshape(-1, *arrays[0].shape[1:])

    return [jax.tree.map(merge, *alike) for _, alike in itertools.groupby(texts, shape)]


def join(parts: Parts, groups: int | None = None) -> Array:
    """[B_p, L_p, ...] of every part -> [S, T, ...]; a single part as it is. groups: S, by
    default of those that share rows.
    """
    if len(parts) == 1:
        return parts[0]
    groups = groups or row_shards()
    return jnp.concatenate([part.reshape(groups, -1, *part.shape[2:]) for part in parts], axis=1)


def split(stream: Array, shapes: Sequence[tuple[int, int]]) -> list[Array]:
    """The inverse of `join`, for the (B_p, L_p) of every part."""
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
    """The length of equal blocks into which the stream of rows (B_p, L_p) can be cut with no
    row across two of them: that of the longest row.

    None for a single part, where rows do not lie so, or where attention within blocks rather
    than rows would compute more than twice as much.
    """
    shards, longest = row_shards(), max(length for _, length in shapes)
    counts = [rows * length // shards for rows, length in shapes]
    starts = [sum(counts[:place]) for place in range(len(counts))]
    aligned = sum(counts) % longest == 0 and all(
        longest % length == 0 and start % length == 0
        for start, (_, length) in zip(starts, shapes, strict=True)
    )
    needed = sum(count * length for count, (_, length) in zip(counts, shapes, strict=True))
    return longest if len(shapes) > 1 and aligned and sum(counts) * longest <= 2 * needed else None


def block_segments(segments: Parts) -> Array:
    """[B_p, L_p] segment numbers of every part -> [S, T] numbers that no two rows of a group
    share; padding stays 0.

    A row of L tokens has the next L numbers, so that a group's largest is how many tokens it
    has.
    Raises: ValueError where that is more than int32 holds.
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
    """(B_p, L_p) of every part."""
    return [(part.shape[0], part.shape[1]) for part in parts]
