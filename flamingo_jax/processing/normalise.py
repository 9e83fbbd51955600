"""Normalises pixels for the vision encoder, on the device: hosts transfer uint8."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def normalise(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: DTypeLike
) -> jax.Array:
    """Scales uint8 [..., 3] to 0..1, subtracts each channel's mean and divides by its standard
    deviation: dtype [..., 3].
    """
    x = images.astype(jnp.float32) / 255.0
    return ((x - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).astype(dtype)
