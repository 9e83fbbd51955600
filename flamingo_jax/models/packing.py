"""Rows of several datasets as one stream of tokens, so that a weight meets all of them in one
product.

A stream [S, T, ...] has one row for each of the S groups of devices that share the datasets'
rows: all of the group's tokens, dataset after dataset. Nothing crosses devices when it is
joined or split. Rows of one dataset alone stay [B, L, ...].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax.partitioning.constraints import row_shards

Array = jax.Array
Parts = Sequence[Array]
"""One array for each dataset."""


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


def as_parts(rows: Array | Parts) -> Parts:
    """One dataset's array as the parts of a stream."""
    return rows if isinstance(rows, tuple | list) else (rows,)


def shapes_of(parts: Parts) -> list[tuple[int, int]]:
    """(B_p, L_p) of every part."""
    return [(part.shape[0], part.shape[1]) for part in parts]
