"""Greedy decoding and nucleus sampling of prompts that come and go: a fixed number of rows, each
with a prompt of its own, its own options and its own step.

`start` reads prompts, `insert` puts them into free rows, `advance` decodes a few tokens of every
row. All are jittable. A row ends at its first stop token (paper: the first <EOC>) or with its
last allowed token, and then waits to be replaced.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flamingo_jax.inference.decoding import (
    NO_TOKEN,
    TokenConstraints,
    next_logits,
    suppress,
)
from flamingo_jax.inference.prefill import DecodingModel, PromptArrays, prefill
from flamingo_jax.models import ops
from flamingo_jax.models.cache import map_cache

Array = jax.Array


class RowOptions(NamedTuple):
    """How each of B rows is decoded.

    key: uint32 [B, ...], the data of a PRNG key for sampling.
    budget: int32 [B], the tokens that may follow the prompt, its stop token included.
    temperature: float32 [B]; 0 takes the likeliest token (greedy).
    top_p: float32 [B], of nucleus sampling (Holtzman et al. 2020): only the likeliest tokens
      that together have this probability.
    """

    key: Array
    budget: Array
    temperature: Array
    top_p: Array


class Rows(NamedTuple):
    """The state of B rows.

    cache: the tokens so far, without `token`, the next input. token, position: int32 [B].
    media, visuals, media_index: what all further tokens attend to; of
      `PreparedVisuals.of_rows`, or None.
    step: int32 [B], tokens that followed the prompt. open: bool [B], whether more will.
    """

    cache: Any
    token: Array
    position: Array
    media: Any
    visuals: Array | None
    media_index: Array
    options: RowOptions
    step: Array
    open: Array


class Chunk(NamedTuple):
    """The next tokens of B rows.

    tokens: int32 [B, T], with the stop token; NO_TOKEN after the row's end.
    log_probabilities: float32 [B, T], by the model's own distribution, before temperature and
      nucleus.
    open: bool [B], whether more tokens will follow.
    """

    tokens: Array
    log_probabilities: Array
    open: Array


def start(
    model: DecodingModel, prompts: PromptArrays, media: Any, options: RowOptions, size: int
) -> Rows:
    """Reads prompts into new rows, whose caches have `size` slots for prompt and answer.

    media: of `Flamingo.prepare_media`; None without visuals.
    """
    read = prefill(model, prompts, media, size)
    visuals = read.visuals
    if visuals is not None:
        media, visuals = media.of_rows(visuals)
    return Rows(
        read.cache,
        read.last,
        read.position,
        media,
        visuals,
        read.media_index,
        options,
        jnp.zeros_like(read.last),
        options.budget > 0,
    )


def insert(rows: Rows, new: Rows, places: Array) -> Rows:
    """Replaces the rows at `places`, int32 [b], by the b new ones; a new row whose place is past
    the end is left out.
    """

    def put(a: Array, b: Array) -> Array:
        return a.at[places].set(b, mode="drop")

    def put_second_axis(b: Array, a: Array) -> Array:
        return a.at[:, places].set(b, mode="drop")

    # What the rows of a cache share is taken from the new rows: in empty rows it is missing.
    cache = map_cache(put_second_axis, new.cache, rows.cache)
    media, visuals = rows.media, rows.visuals
    if visuals is not None and new.visuals is not None:
        count = visuals.shape[1]
        first = jnp.where(new.visuals >= 0, places[:, None] * count, 0)
        own = new.visuals % count
        visuals = put(visuals, jnp.where(new.visuals >= 0, first + own, -1))
        # Row b's visuals are the numbers b * count and on.
        numbers = (places[:, None] * count + jnp.arange(count)).reshape(-1)
        media = rows.media._replace(
            media=jax.tree.map(
                lambda a, b: a.at[:, numbers].set(b, mode="drop"), media.media, new.media.media
            ),
            broken=media.broken.at[numbers].set(new.media.broken, mode="drop"),
        )
    return Rows(
        cache,
        put(rows.token, new.token),
        put(rows.position, new.position),
        media,
        visuals,
        put(rows.media_index, new.media_index),
        jax.tree.map(put, rows.options, new.options),
        put(rows.step, new.step),
        put(rows.open, new.open),
    )


def empty(model: DecodingModel, like: Rows, count: int, size: int) -> Rows:
    """Makes `count` closed rows, with caches of `size` slots, into which rows such as `like` can
    be inserted.
    """
    before = like.token.shape[0]

    def zeros(a: Array) -> Array:
        return jnp.zeros((count, *a.shape[1:]), a.dtype)

    def media_zeros(a: Array) -> Array:
        return jnp.zeros((a.shape[0], count * a.shape[1] // before, *a.shape[2:]), a.dtype)

    media = like.media
    if media is not None:
        broken = jnp.zeros(count * media.broken.shape[0] // before, bool)
        media = media._replace(media=jax.tree.map(media_zeros, media.media), broken=broken)
    # What rows share is `like`'s; the rest the model's own, since it knows how it is sharded.
    cache = map_cache(lambda _, b: b, like.cache, model.init_cache(count, size))
    rest = like._replace(cache=None, media=None)
    return jax.tree.map(zeros, rest)._replace(cache=cache, media=media)


def advance(
    model: DecodingModel,
    rows: Rows,
    cancelled: Array,
    steps: Array,
    constraints: TokenConstraints,
    width: int,
) -> tuple[Rows, Chunk]:
    """Decodes the next `steps` tokens of every open row, at most `width`.

    cancelled: bool [B], rows that are to be closed before.
    """
    count = rows.token.shape[0]

    def body(carry: tuple[Array, Rows, Array, Array]) -> tuple[Array, Rows, Array, Array]:
        step, s, tokens, gains = carry
        logits, cache = next_logits(
            model,
            s.token[:, None],
            s.position[:, None],
            s.media_index,
            s.media,
            s.visuals,
            s.cache,
        )
        logits = logits[:, 0]
        token = _pick(suppress(logits, constraints.suppressed), s)
        gained = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        gained -= jax.nn.logsumexp(logits, axis=-1)
        # Rows that have ended are decoded too, without effect.
        done = s.step + s.open
        goes_on = s.open & ~jnp.isin(token, jnp.array(constraints.stop, jnp.int32))
        after = s._replace(
            cache=cache,
            token=jnp.where(s.open, token, s.token),
            position=s.position + s.open,
            step=done,
            open=goes_on & (done < s.options.budget),
        )
        return (
            step + 1,
            after,
            tokens.at[:, step].set(jnp.where(s.open, token, NO_TOKEN)),
            gains.at[:, step].set(jnp.where(s.open, gained, 0.0)),
        )

    first = (
        jnp.int32(0),
        rows._replace(open=rows.open & ~cancelled),
        jnp.full((count, width), NO_TOKEN, jnp.int32),
        jnp.zeros((count, width)),
    )
    _, rows, tokens, gains = jax.lax.while_loop(
        lambda c: (c[0] < jnp.minimum(steps, width)) & c[1].open.any(), body, first
    )
    return rows, Chunk(tokens, gains, rows.open)


def _pick(logits: Array, rows: Rows) -> Array:
    """Picks every row's next token, the likeliest or a sampled one: [B, V] -> int32 [B]."""
    options = rows.options
    likeliest = ops.argmax(logits)
    samples = options.temperature > 0

    def sample() -> Array:
        scaled = logits / jnp.where(samples, options.temperature, 1.0)[:, None]
        scaled = jax.lax.cond(
            (options.top_p < 1).any(), lambda: nucleus(scaled, options.top_p), lambda: scaled
        )
        # The key is of the row and its step, so that other rows do not matter.
        keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(options.key), rows.step)
        drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
        return jnp.where(samples, drawn, likeliest)

    # Conditions at run time: rows of all options share one compiled program.
    return jax.lax.cond(samples.any(), sample, lambda: likeliest)


def nucleus(logits: Array, top_p: Array) -> Array:
    """Sets logits [B, V] to -inf outside the nucleus, the smallest set of likeliest tokens
    whose probabilities sum to `top_p` [B] or more; 1 keeps all.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    # The probability of all likelier tokens: a token is in the nucleus if it is below top_p.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = before < top_p[:, None]
    least = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((logits >= least) | (top_p >= 1)[:, None], logits, -jnp.inf)
