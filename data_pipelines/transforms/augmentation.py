"""Left-right flips and colour jitter, one draw per visual: every frame of a clip gets the same."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

GREY = np.array([0.299, 0.587, 0.114], np.float32)
HUE_TURN = 0.1
"""Part of the colour circle that strength 1 may turn the hue by, either way."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """One draw. `colour` is a 3 x 3 map of RGB (brightness, saturation and hue at once); `contrast` scales about the mean grey."""

    flip: bool
    colour: np.ndarray | None
    contrast: float = 1.0

    def __call__(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """Frames of one visual, uint8 [h, w, 3] each."""
        if self.flip:
            frames = [frame[:, ::-1] for frame in frames]
        if self.colour is None or not frames:
            return frames
        mean = float(np.mean([frame.reshape(-1, 3).mean(axis=0) @ GREY for frame in frames]))
        matrix = (self.contrast * self.colour).astype(np.float32)
        offset = (1 - self.contrast) * mean
        return [(frame.astype(np.float32) @ matrix.T + offset).round().clip(0, 255).astype(np.uint8) for frame in frames]


def draw(uniform: Callable[[float, float], float], *, flip: bool, colour: float) -> Augmentation | None:
    """A random augmentation; None, and nothing drawn, where both are off.

    uniform: draws a number from low up to high.
    colour: strength; brightness, contrast and saturation are scaled by 1 - colour to 1 + colour, hue turns by up to 36 degrees x colour.
    """
    if not flip and not colour:
        return None
    flipped = flip and uniform(0, 1) < 0.5
    if not colour:
        return Augmentation(flipped, None)
    brightness, contrast, saturation = (max(uniform(1 - colour, 1 + colour), 0.0) for _ in range(3))
    turn = 2 * math.pi * HUE_TURN * colour * uniform(-1, 1)
    return Augmentation(flipped, brightness * _saturation(saturation) @ _hue(turn), contrast)


def _saturation(factor: float) -> np.ndarray:
    return factor * np.eye(3) + (1 - factor) * np.ones((3, 1)) * GREY


def _hue(angle: float) -> np.ndarray:
    """Rotation about the grey axis: greys stay as they are."""
    c, s = math.cos(angle), math.sin(angle)
    third, root = (1 - c) / 3, math.sqrt(1 / 3) * s
    return np.array([
        [c + third, third - root, third + root],
        [third + root, c + third, third - root],
        [third - root, third + root, c + third],
    ])
