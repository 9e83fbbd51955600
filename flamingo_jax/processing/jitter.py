"""Colour jitter on the device: what a host drew for each image, applied where its pixels are
needed.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
GREY = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue in a grey (ITU-R BT.601)."""
FIELDS = ("brightness", "contrast", "saturation", "hue", "height", "width")
"""What is drawn for a frame, and the size of the image that stands in the middle of its square.

brightness, contrast, saturation: factors; hue: part of the colour circle that it turns by. A
frame of no size stays as it is.
"""


def jittered(images: Array, jitter: Array) -> Array:
    """Scales brightness, contrast and saturation and turns the hue of the images within their
    squares.

    Contrast is about the mean grey of a visual's frames, each of which counts alike. What pads
    an image to its square keeps its colour, which is the vision encoder's zero. All in float32,
    without matrix products, which accelerators would round.

    Args:
      images: uint8 [..., T, H, W, 3], the T frames of each visual.
      jitter: float32 [..., T, 6], the `FIELDS` of each frame.
    Returns: uint8 of the same shape.
    """
    brightness, contrast, saturation, hue, height, width = (
        jitter[..., place] for place in range(len(FIELDS))
    )
    x = images.astype(jnp.float32)
    inside = _middle(height, x.shape[-3])[..., :, None] & _middle(width, x.shape[-2])[..., None, :]
    grey = jnp.where(inside, (x * GREY).sum(-1), 0.0)
    frame_mean = grey.sum((-2, -1)) / jnp.maximum(height * width, 1.0)
    mean = frame_mean.sum(-1, keepdims=True) / jnp.maximum((height > 0).sum(-1, keepdims=True), 1)
    colour = contrast[..., None, None] * _colour(brightness, saturation, hue)
    offset = (1 - contrast) * mean
    # [..., T, 1, 1, 3] for each channel that is read.
    columns = [x[..., channel, None] * colour[..., None, None, :, channel] for channel in range(3)]
    changed = sum(columns[1:], columns[0]) + offset[..., None, None, None]
    changed = jnp.round(changed).clip(0, 255).astype(jnp.uint8)
    return jnp.where(inside[..., None], changed, images)


def _middle(size: Array, side: int) -> Array:
    """bool [..., side], True on the `size` places in the middle, as `images.pad` puts them
    there.
    """
    size = size.astype(jnp.int32)[..., None]
    first, place = (side - size) // 2, jnp.arange(side)
    return (place >= first) & (place < first + size)


def _colour(brightness: Array, saturation: Array, hue: Array) -> Array:
    """The map of RGB [..., 3, 3]: the hue turned about the grey axis, then saturation, then
    brightness.
    """
    angle = 2 * np.pi * hue
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
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
    # The grey of what was turned is each output's part that saturation does not scale.
    greys = (turned * GREY[:, None]).sum(-2, keepdims=True)
    scale = saturation[..., None, None]
    return brightness[..., None, None] * (scale * turned + (1 - scale) * greys)
