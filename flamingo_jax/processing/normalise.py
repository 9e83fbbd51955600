"""Pixels to the vision encoder's input, on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def normalise(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> jax.Array:
    """Normalises uint8 [..., 3] -> dtype [..., 3]: scaled to 0..1, then to the channels' mean
    0 and deviation 1.
    """
    x = images.astype(jnp.float32) / 255.0
    return ((x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).astype(dtype)
