"""Rows of several datasets as one stream of tokens, so that a weight meets all of them in one product.

A stream [S, T, ...] has one row for each of the S groups of devices that share the datasets' rows: all of the group's tokens, dataset after
dataset. Nothing crosses devices when it is joined or split. Rows of one dataset alone stay [B, L, ...].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flamingo_jax.partitioning.constraints import row_shards

Array = jax.Array
Parts = Sequence[Array]
"""One array for each dataset."""


def join(parts: Parts) -> Array:
    """[B_p, L_p, ...] of every part -> [S, T, ...]; a single part as it is."""
    if len(parts) == 1:
        return parts[0]
    shards = row_shards()
    return jnp.concatenate([part.reshape(shards, -1, *part.shape[2:]) for part in parts], axis=1)


def split(stream: Array, shapes: Sequence[tuple[int, int]]) -> list[Array]:
    """The inverse of `join`, for the (B_p, L_p) of every part."""
    if len(shapes) == 1:
        return [stream]
    found, start = [], 0
    for rows, length in shapes:
        count = rows * length // stream.shape[0]
        found.append(jax.lax.slice_in_dim(stream, start, start + count, axis=1).reshape(rows, length, *stream.shape[2:]))
        start += count
    return found


def as_parts(rows: Array | Parts) -> Parts:
    """One dataset's array as the parts of a stream."""
    return rows if isinstance(rows, tuple | list) else (rows,)


def shapes_of(parts: Parts) -> list[tuple[int, int]]:
    """(B_p, L_p) of every part."""
    return [(part.shape[0], part.shape[1]) for part in parts]
