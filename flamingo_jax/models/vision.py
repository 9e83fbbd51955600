"""Makes the vision encoder of a config (NFNet or ViT), and encodes a batch's frames with it on
all devices of a mesh.
"""

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
from flamingo_jax.partitioning.constraints import constrain, shard_over_all_devices, shards
from flamingo_jax.partitioning.mesh import AXES, MODEL, ROWS
from flamingo_jax.processing.normalise import normalise

Array = jax.Array
VisionEncoder = NFNet | ViT


def vision_encoder(config: VisionConfig, *, rngs: nnx.Rngs) -> VisionEncoder:
    """Makes the vision encoder of a config.

    Both kinds map normalised images [M, H, W, 3] to grid features [M, h, w, C], where C is the
    encoder's `width`, and h = w = its `grid` for images of the config's size.
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
    """Encodes the images of several datasets, uint8 [M, T, H, W, 3] each, as one batch over
    all devices -> grid features [M, T, S, C] of each.

    Where every M divides by the number of devices, each device encodes the images that it
    holds; otherwise each row shard spreads its images over its devices anew.

    Args:
      frames_at_once: how many frames each device encodes at a time, 0 for all.
      trains: the encoder is trained. The backward pass then recomputes its activations if
        `remat_mode` is not "none", or if there are several rounds, so that one round's
        activations at most are in memory.
    """
    axes = AXES if all(part.shape[0] % shards(AXES) == 0 for part in images) else ROWS
    groups = shards(axes)
    if len(images) == 1 and images[0].shape[0] % groups:
        groups = 1
    frames = join([constrain(part, axes) for part in images], groups)
    frames = frames.reshape(groups, -1, *images[0].shape[2:])  # [G, F, H, W, 3]
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
        # [G, F, ...] -> [rounds, G, F / rounds, ...]
        by_round = frames.reshape(groups, rounds, -1, *frames.shape[2:]).swapaxes(0, 1)
        features = jax.lax.map(encode, by_round).swapaxes(0, 1)
        features = features.reshape(groups, padded, *features.shape[3:])
    features = constrain(features[:, :count], axes)
    if len(images) == 1:
        return [constrain(features.reshape(*images[0].shape[:2], *features.shape[2:]), ROWS)]
    return [constrain(part, ROWS) for part in split(features, shapes_of(images))]


def _rounds(count: int, devices: int, frames_at_once: int) -> tuple[int, int]:
    """Returns in how many rounds the encoder takes the `count` frames of each group of
    devices, and how many frames these are after padding to equal rounds.
    """
    rounds = math.ceil(count / (frames_at_once * devices or count))
    each = math.ceil(math.ceil(count / rounds) / devices) * devices
    return rounds, rounds * each


def _encode(encoder: VisionEncoder, config: VisionConfig, dtype: DTypeLike, frames: Array) -> Array:
    """Encodes frames uint8 [G, F, H, W, 3] -> [G, F, cells, C], data-parallel over all
    devices.
    """
    images = shard_over_all_devices(frames.reshape(-1, *frames.shape[2:]))
    features = shard_over_all_devices(encoder(normalise(images, config.mean, config.std, dtype)))
    return features.reshape(*frames.shape[:2], -1, features.shape[-1])
