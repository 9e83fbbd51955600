"""The jitted programs that bring visuals into a batch. They are module-level with the static graph
as an argument, so that all engines of equal models share their compiled programs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
