"""Draws where a token looked, as a heat map over the image that the model saw."""

import matplotlib
import numpy as np
from PIL import Image

COLOURS = "inferno"
"""A colour map whose lightness rises all along, so that it reads in grey too."""
STRENGTH = 0.85
"""How far the brightest place hides the image beneath."""


def overlay(frame: np.ndarray, heat: np.ndarray, most: float, side: int) -> np.ndarray:
    """Draws a heat map over a frame.

    Args:
      frame: uint8 [S, S, 3].
      heat: float32 [h, w], of the encoder's grid.
      most: the heat that is drawn brightest, so that frames of a clip can be compared.
      side: of the result in pixels.

    Returns: uint8 [side, side, 3].
    """
    shown = Image.fromarray(frame).resize((side, side), _filter(frame.shape[0], side))
    share = (np.clip(heat / most, 0.0, 1.0) if most > 0 else np.zeros_like(heat)).astype(np.float32)
    # Smooth between the cells' centres: the grid is coarse, and its edges are not the image's.
    smooth = Image.fromarray(share).resize((side, side), Image.Resampling.BICUBIC)
    share = np.clip(np.asarray(smooth), 0.0, 1.0)[..., None]
    colours = matplotlib.colormaps[COLOURS](share[..., 0])[..., :3] * 255
    # The image in grey, so that colours mean attention alone.
    grey = np.asarray(shown.convert("L"), np.float32)[..., None]
    hidden = STRENGTH * np.sqrt(share)
    return np.round((1 - hidden) * grey + hidden * colours).astype(np.uint8)


def enlarge(frame: np.ndarray, side: int) -> np.ndarray:
    """Resizes a frame uint8 [S, S, 3] to the size of its heat map."""
    resized = Image.fromarray(frame).resize((side, side), _filter(frame.shape[0], side))
    return np.asarray(resized)


def _filter(size: int, side: int) -> Image.Resampling:
    """Chooses how to resize: pixels of small images stay square."""
    return Image.Resampling.NEAREST if side >= 4 * size else Image.Resampling.BICUBIC
