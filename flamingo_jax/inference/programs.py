"""The jitted programs of an engine. They are module-level with the static graph as an argument,
so that all engines of equal models share their compiled programs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.inference import rows
from flamingo_jax.inference.decoding import TokenConstraints
from flamingo_jax.inference.prefill import (
    Prefilled,
    Prefix,
    PromptArrays,
    prefill,
    read_prefix,
)
from flamingo_jax.inference.scoring import TreeArrays, next_log_probabilities

Array = jax.Array


@functools.partial(jax.jit, static_argnames="graph")
def encode_visuals(graph: Any, state: nnx.State, images: Array, frame_mask: Array) -> Array:
    """Encodes visuals uint8 [M, T, S, S, 3] and frame masks bool [M, T] -> visual tokens
    [M, R, D].
    """
    return nnx.merge(graph, state).encode_visuals(images, frame_mask)


@functools.partial(jax.jit, static_argnames="graph")
def mean_features(graph: Any, state: nnx.State, images: Array, frame_mask: Array) -> Array:
    """Averages the frozen encoder's features over cells and frames: float32 [M, C]."""
    features = nnx.merge(graph, state).encode_images([images])[0].astype(jnp.float32).mean(axis=2)
    real = frame_mask[..., None]
    return jnp.where(real, features, 0.0).sum(axis=1) / jnp.maximum(real.sum(axis=1), 1)


@functools.partial(jax.jit, static_argnames="graph")
def prepare_media(graph: Any, state: nnx.State, visual_tokens: Array) -> Any:
    """Computes every cross-attention block's keys and values of visual tokens [M, R, D]: see
    `Flamingo.prepare_media`.
    """
    return nnx.merge(graph, state).prepare_media(visual_tokens)


@functools.partial(jax.jit, static_argnames=("graph", "size"))
def prefill_prompts(
    graph: Any, state: nnx.State, prompts: PromptArrays, media: Any, size: int
) -> Prefilled:
    """Reads prompts into a cache of `size` slots: see `prefill`."""
    return prefill(nnx.merge(graph, state), prompts, media, size)


@functools.partial(jax.jit, static_argnames="graph")
def read_prompts_prefix(graph: Any, state: nnx.State, prompts: PromptArrays, media: Any) -> Prefix:
    """Reads what prompts begin with: see `read_prefix`."""
    return read_prefix(nnx.merge(graph, state), prompts, media)


@functools.partial(jax.jit, static_argnames="graph")
def score_tree(
    graph: Any, state: nnx.State, prefilled: Prefilled, media: Any, tree: TreeArrays
) -> Array:
    """Scores a part of the trees of candidates: see `next_log_probabilities`."""
    return next_log_probabilities(nnx.merge(graph, state), prefilled, media, tree)


@functools.partial(jax.jit, static_argnames="graph")
def prompt_logits(graph: Any, state: nnx.State, prompts: PromptArrays, media: Any) -> Array:
    """Computes the logits of whole prompts, float32 [B, L, V + extra]; 0 at padding."""
    model = nnx.merge(graph, state)
    rows, length = prompts.tokens.shape
    places = jnp.arange(length)
    real = places < prompts.lengths[:, None]
    logits, _ = model.decode(
        prompts.tokens,
        jnp.where(real, places, length),
        prompts.media_index,
        media,
        prompts.visuals,
        model.init_cache(rows, length),
    )
    return jnp.where(real[..., None], logits, 0.0)


@functools.partial(jax.jit, static_argnames=("graph", "size"))
def start_rows(
    graph: Any,
    state: nnx.State,
    prompts: PromptArrays,
    media: Any,
    options: rows.RowOptions,
    size: int,
) -> rows.Rows:
    """Reads prompts into new rows: see `rows.start`."""
    return rows.start(nnx.merge(graph, state), prompts, media, options, size)


@functools.partial(jax.jit, static_argnames=("graph", "count", "size"))
def empty_rows(graph: Any, state: nnx.State, like: rows.Rows, count: int, size: int) -> rows.Rows:
    """Makes closed rows: see `rows.empty`."""
    return rows.empty(nnx.merge(graph, state), like, count, size)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="old")
def insert_rows(
    graph: Any, state: nnx.State, old: rows.Rows, new: rows.Rows, places: Array
) -> rows.Rows:
    """Replaces rows, in place: see `rows.insert`."""
    return rows.insert(old, new, places)


@functools.partial(
    jax.jit, static_argnames=("graph", "constraints", "width"), donate_argnames="old"
)
def advance_rows(
    graph: Any,
    state: nnx.State,
    old: rows.Rows,
    cancelled: Array,
    steps: Array,
    constraints: TokenConstraints,
    width: int,
) -> tuple[rows.Rows, rows.Chunk]:
    """Decodes the next tokens of rows, whose cache is updated in place: see `rows.advance`."""
    model = nnx.merge(graph, state)
    return rows.advance(model, old, cancelled, steps, constraints, width)


@jax.jit
def sampling_keys(seed: Array, numbers: Array) -> Array:
    """Makes the data of the PRNG keys of the prompts' `numbers`, uint32 [B] -> [B, ...]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    return jax.random.key_data(keys)
