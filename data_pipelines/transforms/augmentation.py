"""Left-right flips and colour jitter, one draw per visual: every frame of a clip gets the same.

Flips are made where images are placed in their batch. Colours are changed on the device, by
what is drawn here (`flamingo_jax.processing.jitter`): on a host it takes a third of the time of
reading.
"""

from collections.abc import Callable
from typing import NamedTuple

HUE_TURN = 0.1
"""Part of the colour circle that strength 1 may turn the hue by, either way."""


class Augmentation(NamedTuple):
    """One draw. colour: factors of brightness, contrast and saturation, and the part of the
    colour circle that the hue turns by; None for colours as they are.
    """

    flip: bool
    colour: tuple[float, float, float, float] | None


def draw(
    uniform: Callable[[float, float], float], *, flip: bool, colour: float
) -> Augmentation | None:
    """Draws a random augmentation; None, and nothing drawn, where both are off.

    uniform: draws a number from low up to high.
    colour: strength; brightness, contrast and saturation are scaled by 1 - colour to 1 +
      colour, hue turns by up to 36 degrees x colour.
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
