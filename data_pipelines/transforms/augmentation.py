"""Draws random left-right flips and colour jitter, once per visual: all frames of a clip share
one draw.

This file draws the parameters alone. Flips are applied on the host when a frame is copied into
its batch (`visual_buffer.py`); colour jitter is applied on the device
(`flamingo_jax.processing.jitter`), since on the host it would cost a third of the reading
time.
"""

from collections.abc import Callable
from typing import NamedTuple

HUE_TURN = 0.1
"""Largest hue rotation at strength 1, as a fraction of the colour circle, in either direction.
"""


class Augmentation(NamedTuple):
    """The augmentation drawn for one visual.

    flip: whether to mirror it left to right.
    colour: (brightness factor, contrast factor, saturation factor, hue rotation as a fraction
      of the colour circle), or None to leave the colours unchanged.
    """

    flip: bool
    colour: tuple[float, float, float, float] | None


def draw(
    uniform: Callable[[float, float], float], *, flip: bool, colour: float
) -> Augmentation | None:
    """Draws a random augmentation; returns None, without drawing, where both kinds are off.

    Args:
      uniform: draws a number uniformly from [low, high).
      flip: mirror with probability 1/2.
      colour: jitter strength. Brightness, contrast and saturation are each scaled by a factor
        from 1 - colour to 1 + colour (at least 0); the hue rotates by up to 36 degrees x
        colour.
    """
    if not flip and not colour:
        return None
    flipped = flip and uniform(0, 1) < 0.5
    if not colour:
        return Augmentation(flipped, None)
    brightness, contrast, saturation = (max(uniform(1 - colour, 1 + colour), 0.0) for _ in range(3))
    return Augmentation(
        flipped, (brightness, contrast, saturation, HUE_TURN * colour * uniform(-1, 1))
    )
