"""Applies colour jitter on the device, with factors that the data pipeline drew for each
frame.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in luma (ITU-R BT.601)."""
FIELDS = ("brightness", "contrast", "saturation", "hue", "height", "width")
"""The columns of a batch's `jitter` array, one row per frame.

brightness, contrast, saturation: factors. hue: rotation as a fraction of the colour circle.
height, width: pixels of the image within its padded square; a frame with 0 is left unchanged.
"""


def jittered(images: Array, jitter: Array) -> Array:
    """Applies brightness, contrast, saturation and hue jitter to images.

    Contrast scales around the mean luma of a visual's frames, each frame weighted equally. The
    padding keeps its colour, which normalisation maps to zero. All arithmetic is elementwise
    float32: accelerators would compute a matrix product of RGB in lower precision.

    Args:
      images: uint8 [..., T, H, W, 3], the T frames of each visual.
      jitter: float32 [..., T, 6], the `FIELDS` of each frame.
    Returns: uint8 [..., T, H, W, 3].
    """
    brightness, contrast, saturation, hue, height, width = (
        jitter[..., place] for place in range(len(FIELDS))
    )
    x = images.astype(jnp.float32)
    # bool [..., T, H, W], False on padding.
    inside = _middle(height, x.shape[-3])[..., :, None] & _middle(width, x.shape[-2])[..., None, :]
    grey = jnp.where(inside, (x * GREY).sum(-1), 0.0)  # [..., T, H, W]
    frame_mean = grey.sum((-2, -1)) / jnp.maximum(height * width, 1.0)  # [..., T]
    # [..., 1], over the frames that exist.
    mean = frame_mean.sum(-1, keepdims=True) / jnp.maximum((height > 0).sum(-1, keepdims=True), 1)
    # Contrast is affine, c * x + (1 - c) * mean: its factor joins the colour matrix, [..., T,
    # 3, 3].
    colour = contrast[..., None, None] * _colour(brightness, saturation, hue)
    offset = (1 - contrast) * mean
    # The product of the colour matrix and each pixel, as a sum over the three input channels
    # of [..., T, H, W, 1] * [..., T, 1, 1, 3].
    columns = [x[..., channel, None] * colour[..., None, None, :, channel] for channel in range(3)]
    changed = sum(columns[1:], columns[0]) + offset[..., None, None, None]
    changed = jnp.round(changed).clip(0, 255).astype(jnp.uint8)
    return jnp.where(inside[..., None], changed, images)


def _middle(size: Array, side: int) -> Array:
    """Returns bool [..., side], True on the `size` centred positions where `images.pad` puts
    an image.
    """
    size = size.astype(jnp.int32)[..., None]
    first, place = (side - size) // 2, jnp.arange(side)
    return (place >= first) & (place < first + size)


def _colour(brightness: Array, saturation: Array, hue: Array) -> Array:
    """Computes the colour matrix [..., 3, 3] (output, input channel): a hue rotation about the
    grey axis, then saturation, then brightness.
    """
    angle = 2 * np.pi * hue
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    # Rodrigues' rotation about (1, 1, 1) / sqrt(3).
    third, root = (1 - cosine) / 3, np.sqrt(1 / 3) * sine
    same, before, after = cosine + third, third - root, third + root
    turned = jnp.stack(
        [
            jnp.stack([same, before, after], -1),
            jnp.stack([after, same, before], -1),
            jnp.stack([before, after, same], -1),
        ],
        -2,
    )
    # Saturation interpolates between the rotated colour and its luma: s * x + (1 - s) *
    # luma(x).
    greys = (turned * GREY[:, None]).sum(-2, keepdims=True)
    scale = saturation[..., None, None]
    return brightness[..., None, None] * (scale * turned + (1 - scale) * greys)
