"""Renders scenes of the synthetic world: coloured shapes on a dark background."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.synthetic_world.scenes import COLOURS, DIRECTIONS, Scene

SIZE = 48
"""Side of every image, in pixels."""
FRAMES = 8
"""Frames of a clip, one per second (paper 3.2)."""
FINE = 4
"""Supersampling factor for antialiasing."""
PATCH = 28
"""Side in pixels of the patch that one shape is drawn in, with a margin for subpixel
positions.
"""


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Renders a scene: uint8 [48, 48, 3].

    Things have a random shade, size and offset (up to 2 pixels), and the dark background is
    slightly noisy, so that images of equal scenes differ.
    """
    small = scene.kind == "counts"
    canvas = _ground(rng)
    colours = {
        thing: _nameless(rng) if scene.nameless else np.asarray(COLOURS[thing.colour])
        for thing in scene.things
    }
    for thing, cell in zip(scene.things, scene.cells, strict=True):
        radius = rng.uniform(5.6, 6.4) if small else rng.uniform(7.0, 9.0)
        jitter = rng.uniform(-0.5, 0.5, 2) if small else rng.uniform(-2.0, 2.0, 2)
        _paint(canvas, thing.shape, _shade(colours[thing], rng), _centre(cell) + jitter, radius)
    return _pixels(canvas, rng)


def render_clip(scene: Scene, rng: np.random.Generator) -> list[np.ndarray]:
    """Renders a clip of one thing that crosses the image: 8 frames uint8 [48, 48, 3]."""
    thing, step = scene.things[0], np.asarray(DIRECTIONS[scene.moving], float)
    radius, shade = rng.uniform(7.0, 9.0), _shade(np.asarray(COLOURS[thing.colour]), rng)
    ground = _ground(rng)
    length = rng.uniform(20.0, 27.0)
    across = rng.uniform(-11.0, 11.0)
    start = _centre(4) + across * np.abs(step[::-1]) - step * length / 2
    frames = []
    for frame in range(FRAMES):
        canvas = ground.copy()
        _paint(
            canvas,
            thing.shape,
            shade,
            start + step * length * frame / (FRAMES - 1) + rng.uniform(-0.5, 0.5, 2),
            radius,
        )
        frames.append(_pixels(canvas, rng))
    return frames


def png(pixels: np.ndarray) -> bytes:
    """Encodes an image as PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _centre(cell: int) -> np.ndarray:
    """Returns the centre (x, y) of a cell of the 3 x 3 grid, in pixels."""
    return np.array([11.0 + 13.0 * (cell % 3), 11.0 + 13.0 * (cell // 3)])


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Draws a dark background colour: float64 [48, 48, 3] in 0..255."""
    return np.full((SIZE, SIZE, 3), rng.uniform(25.0, 75.0)) + rng.uniform(-4.0, 4.0, 3)


def _nameless(rng: np.random.Generator) -> np.ndarray:
    """Draws a colour far from all named ones and from the background (rejection sampling)."""
    while True:
        colour = rng.uniform(0.0, 255.0, 3)
        if np.max(colour) > 140 and all(
            np.linalg.norm(colour - named) > 75 for named in COLOURS.values()
        ):
            return colour


def _shade(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Varies a colour slightly."""
    return colour * rng.uniform(0.9, 1.0) + rng.uniform(-10.0, 10.0, 3)


def _pixels(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds noise and converts to uint8 [48, 48, 3]."""
    noisy = canvas + rng.integers(-2, 3, (SIZE, SIZE, 1))
    return noisy.clip(0, 255).astype(np.uint8)


def _paint(
    canvas: np.ndarray, shape: str, colour: np.ndarray, centre: np.ndarray, radius: float
) -> None:
    """Alpha-blends a shape into float [48, 48, 3], in place; centre is (x, y) in pixels."""
    corner = np.round(centre - PATCH / 2).astype(int)
    mask = Image.new("L", (PATCH * FINE, PATCH * FINE))
    _OUTLINES[shape](ImageDraw.Draw(mask), (centre - corner) * FINE, radius * FINE)
    cover = np.asarray(mask.reduce(FINE), np.float64)[..., None] / 255  # Alpha, [28, 28, 1].
    # Clip the patch to the image.
    left, top = np.maximum(corner, 0)
    right, bottom = np.minimum(corner + PATCH, SIZE)
    cover = cover[top - corner[1] : bottom - corner[1], left - corner[0] : right - corner[0]]
    canvas[top:bottom, left:right] += cover * (colour - canvas[top:bottom, left:right])


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: int) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _polygon(
    draw: ImageDraw.ImageDraw,
    centre: np.ndarray,
    radius: float,
    points: Sequence[tuple[float, float]],
) -> None:
    draw.polygon([(centre[0] + x * radius, centre[1] + y * radius) for x, y in points], fill=255)


def _circle(draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float) -> None:
    _disc(draw, centre[0], centre[1], radius, 255)


def _ring(draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float) -> None:
    _disc(draw, centre[0], centre[1], radius, 255)
    _disc(draw, centre[0], centre[1], 0.55 * radius, 0)


def _moon(draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float) -> None:
    _disc(draw, centre[0], centre[1], radius, 255)
    _disc(draw, centre[0] + 0.55 * radius, centre[1] - 0.1 * radius, 0.8 * radius, 0)


def _heart(draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float) -> None:
    for side in (-0.5, 0.5):
        _disc(draw, centre[0] + side * radius, centre[1] - 0.4 * radius, 0.52 * radius, 255)
    _polygon(draw, centre, radius, [(-0.97, -0.18), (0.97, -0.18), (0, 1)])


def _of_points(
    *points: tuple[float, float],
) -> Callable[[ImageDraw.ImageDraw, np.ndarray, float], None]:
    return lambda draw, centre, radius: _polygon(draw, centre, radius, points)


_THIRD = 0.33
# Coordinates are relative to the centre, in radii; y points down.
_OUTLINES: dict[str, Callable[[ImageDraw.ImageDraw, np.ndarray, float], None]] = {
    "circle": _circle,
    "square": _of_points((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "triangle": _of_points((0, -1), (1, 0.8), (-1, 0.8)),
    "cross": _of_points(
        (-_THIRD, -1),
        (_THIRD, -1),
        (_THIRD, -_THIRD),
        (1, -_THIRD),
        (1, _THIRD),
        (_THIRD, _THIRD),
        (_THIRD, 1),
        (-_THIRD, 1),
        (-_THIRD, _THIRD),
        (-1, _THIRD),
        (-1, -_THIRD),
        (-_THIRD, -_THIRD),
    ),
    "star": _of_points(
        *(
            (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
            for i in range(10)
            for r in [1.1 if i % 2 == 0 else 0.45]
        )
    ),
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
}
