"""The vision encoder that a config asks for, and images through it on all devices of a mesh."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flamingo_jax.experiment import VisionConfig
from flamingo_jax.models.layers import remat
from flamingo_jax.models.nfnet import NFNet
from flamingo_jax.models.packing import Parts, join, shapes_of, split
from flamingo_jax.models.vit import ViT
from flamingo_jax.partitioning.constraints import constrain, everywhere, shards
from flamingo_jax.partitioning.mesh import AXES, MODEL, ROWS
from flamingo_jax.processing.normalise import normalise

Array = jax.Array
VisionEncoder = NFNet | ViT


def vision_encoder(config: VisionConfig, *, rngs: nnx.Rngs) -> VisionEncoder:
    """Both map normalised images [M, H, W, 3] to grid features [M, h, w, C], C being their
    `width`, and h = w = `grid` for images of the config's size.
    """
    return NFNet(config, rngs=rngs) if config.vit is None else ViT(config, rngs=rngs)


def encode_frames(
    encoder: VisionEncoder,
    config: VisionConfig,
    images: Parts,
    *,
    dtype: DTypeLike,
    frames_at_once: int,
    trains: bool,
    remat_mode: str,
) -> list[Array]:
    """Encodes the images of several datasets, uint8 [M, T, H, W, 3] each, as one batch over all
    devices -> grid features [M, T, S, C] of each.

    Where all M divide, every device encodes the images that lie on it; else row shards share
    theirs out anew.

    Args:
      frames_at_once: how many frames each device encodes at a time, 0 for all.
      trains: the encoder has a gradient, for which frames are encoded again where something is
        (`remat_mode`), or where they are many: no more than a time's activations are then held.
    """
    axes = AXES if all(part.shape[0] % shards(AXES) == 0 for part in images) else ROWS
    groups = shards(axes)
    if len(images) == 1 and images[0].shape[0] % groups:
        groups = 1
    frames = join([constrain(part, axes) for part in images], groups)
    frames = frames.reshape(groups, -1, *images[0].shape[2:])
    count = frames.shape[1]
    rounds, padded = _rounds(count, 1 if axes == AXES else shards(MODEL), frames_at_once)
    if padded > count:
        frames = jnp.pad(frames, ((0, 0), (0, padded - count), *[(0, 0)] * 3))
    encode: Callable[[Array], Array] = functools.partial(
        _encode, encoder.prepared(dtype), config, dtype
    )
    if trains and (rounds > 1 or remat_mode != "none"):
        encode = remat(encode, "layers")
    if rounds == 1:
        features = encode(frames)
    else:
        by_round = frames.reshape(groups, rounds, -1, *frames.shape[2:]).swapaxes(0, 1)
        features = jax.lax.map(encode, by_round).swapaxes(0, 1)
        features = features.reshape(groups, padded, *features.shape[3:])
    features = constrain(features[:, :count], axes)
    if len(images) == 1:
        return [constrain(features.reshape(*images[0].shape[:2], *features.shape[2:]), ROWS)]
    return [constrain(part, ROWS) for part in split(features, shapes_of(images))]


def _rounds(count: int, devices: int, frames_at_once: int) -> tuple[int, int]:
    """In how many rounds the encoder takes `count` frames of each group of devices, and how many
    frames these are when padded.
    """
    rounds = math.ceil(count / (frames_at_once * devices or count))
    each = math.ceil(math.ceil(count / rounds) / devices) * devices
    return rounds, rounds * each


def _encode(encoder: VisionEncoder, config: VisionConfig, dtype: DTypeLike, frames: Array) -> Array:
    """uint8 [G, F, H, W, 3] -> [G, F, S, C], data-parallel over all devices."""
    images = everywhere(frames.reshape(-1, *frames.shape[2:]))
    features = everywhere(encoder(normalise(images, config.mean, config.std, dtype)))
    return features.reshape(*frames.shape[:2], -1, features.shape[-1])
