"""The key-value cache of decoding: what is kept of a row's tokens, and how new tokens continue
them.

Shapes: B rows, L new tokens of each, S slots, K key-value heads, d head width. Keys and values
in a cache are heads first, [B, K, S, d]: products of few queries with many keys would otherwise
transpose the whole cache at every step, which takes five times as long as the products on CPUs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class SharedCache(NamedTuple):
    """A cache array without a batch axis: the same for every row, and never updated."""

    value: Array


class Cache(NamedTuple):
    """The key-value cache of a layer; which slot holds which token is the `Continuation`'s.

    key, value: [B, K, S, d].
    distances: Transformer-XL's keys of the distances 0, 1, 2, ..., [positions, H, d]; None for
      other kinds of positions.

    For a stack of layers every array has a leading layer axis.
    """

    key: Array
    value: Array
    distances: SharedCache | None = None


def map_cache(change: Callable[..., Array], cache: Any, *others: Any) -> Any:
    """Applies `change` to every array of a cache that has a batch axis, as `jax.tree.map`
    does; `SharedCache` arrays stay as they are.

    others: caches of the same structure, whose arrays `change` gets as further arguments.
    """

    def is_shared(leaf: Any) -> bool:
        return isinstance(leaf, SharedCache)

    return jax.tree.map(
        lambda a, *b: a if is_shared(a) else change(a, *b), cache, *others, is_leaf=is_shared
    )


class Line(NamedTuple):
    """L tokens that continue each row of a cache one after the other: the token at position s is
    kept in slot s. Positions of S and more are padding, which is not kept.
    """

    def extend(self, cached: Array, new: Array, positions: Array) -> tuple[Array, Array]:
        """Adds new keys or values [B, L, K, d] to cached [B, K, S, d] -> those to attend to,
        [B, S, K, d], and those to keep, [B, K, S, d].
        """
        return _written(cached, new, positions)

    def places(self, positions: Array, slots: int) -> Array:
        """Returns the positions of the keys of `extend`, int32 [B or 1, S]."""
        return jnp.arange(slots)[None]

    def mask(self, positions: Array, slots: int, window: int = 0) -> Array:
        """Makes the causal mask of the tokens at `positions`, int32 [B, L], over the keys of
        `extend` -> bool [B, 1, L, S].

        window: see `attention.causal_mask`.
        """
        places = jnp.arange(slots)
        seen = places <= positions[:, :, None]
        if 0 < window < slots:
            seen &= places > positions[:, :, None] - window
        return seen[:, None]


class Branches(NamedTuple):
    """L tokens that continue each row of a cache as a tree and are not kept: a token attends to
    the row's tokens before the tree, to its ancestors and to itself.

    Continuations with a common beginning share its tokens, and all share the row's cache. Tokens
    are in depth-first order, those of the subtree of token i being i .. ends[i] - 1.

    start: int32 [B], the position of the tree's first level; the tokens before are in the cache,
      a `Line`.
    ends: int32 [B, L].
    """

    start: Array
    ends: Array

    def extend(self, cached: Array, new: Array, positions: Array) -> tuple[Array, Array]:
        """Puts new keys or values [B, L, K, d] behind cached [B, K, S, d] -> [B, S + L, K, d],
        and the cached ones as they are.
        """
        new = new.swapaxes(1, 2).astype(cached.dtype)
        return jnp.concatenate([cached, new], axis=2).swapaxes(1, 2), cached

    def places(self, positions: Array, slots: int) -> Array:
        """Returns the positions of a cache's `slots` and behind them of the tree's tokens,
        themselves at `positions`, int32 [B, L] -> [B, slots + L].
        """
        cached = jnp.broadcast_to(jnp.arange(slots), (positions.shape[0], slots))
        return jnp.concatenate([cached, positions], axis=1)

    def mask(self, positions: Array, slots: int, window: int = 0) -> Array:
        """Makes the mask of the tree's tokens at `positions`, int32 [B, L], over the keys of
        `extend` -> bool [B, 1, L, slots + L].

        window: see `attention.causal_mask`.
        """
        rows, length = positions.shape
        before = jnp.arange(slots) < self.start[:, None]
        order = jnp.arange(length)
        # Of two tokens in depth-first order, i is in the subtree of j where j <= i < ends[j].
        above = (order <= order[:, None]) & (order[:, None] < self.ends[:, None, :])
        before = jnp.broadcast_to(before[:, None], (rows, length, slots))
        seen = jnp.concatenate([before, above], axis=-1)
        if window:
            seen &= self.places(positions, slots)[:, None] > positions[:, :, None] - window
        return seen[:, None]


class Beams(NamedTuple):
    """The next tokens of L continuations of each row, each of which is kept in a slot of its own.

    All share the row's cache: what came before them is read once, and where one continuation
    takes the place of another, what it attends to changes, and no key or value moves.

    slots: int32 [B, L], the slots of the new tokens.
    held: int32 [B, S], the positions of the tokens in all slots.
    seen: bool [B, L, S], which slots each new token attends to, its own included.
    """

    slots: Array
    held: Array
    seen: Array

    def extend(self, cached: Array, new: Array, positions: Array) -> tuple[Array, Array]:
        """Adds new keys or values, as `Line.extend`."""
        return _written(cached, new, self.slots)

    def places(self, positions: Array, slots: int) -> Array:
        """Returns the positions of the keys of `extend`, int32 [B, S]."""
        return self.held

    def mask(self, positions: Array, slots: int, window: int = 0) -> Array:
        """Makes the mask of the tokens at `positions`, int32 [B, L], over the keys of `extend`
        -> bool [B, 1, L, S].

        window: see `attention.causal_mask`.
        """
        seen = self.seen
        if window:
            seen &= self.held[:, None] > positions[:, :, None] - window
        return seen[:, None]


Continuation = Line | Branches | Beams
"""How new tokens continue the rows of a cache: where they are kept, and what they attend to."""
LINE = Line()


def _written(cached: Array, new: Array, slots: Array) -> tuple[Array, Array]:
    """Writes new [B, L, K, d] into `slots`, int32 [B, L], of cached [B, K, S, d], for
    `Line.extend`.
    """

    def write(cached: Array, new: Array, slots: Array) -> Array:
        return cached.at[:, slots].set(new.swapaxes(0, 1), mode="drop")

    # Row by row, so that a mesh that divides the rows sends none of them.
    kept = jax.vmap(write)(cached, new.astype(cached.dtype), slots)
    # `attend` turns them back, so that nothing is copied.
    return kept.swapaxes(1, 2), kept
