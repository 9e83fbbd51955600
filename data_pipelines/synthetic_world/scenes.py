"""Scenes of the synthetic world: things with a colour and a shape, placed in a 3 x 3 grid.

HELD_OUT are the colour-shape pairs that no image of the train, validation and test splits
shows (text may mention them). Images of `unseen` splits show held-out pairs only: they measure
compositional generalisation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

COLOURS = {
    "red": (215, 35, 40),
    "green": (45, 165, 55),
    "blue": (45, 80, 225),
    "yellow": (240, 225, 50),
    "purple": (150, 50, 190),
    "orange": (245, 135, 25),
    "cyan": (60, 215, 225),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "heart", "moon")
PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""The cells of a 3 x 3 grid, row by row."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Thing:
    """A coloured shape, such as a red heart."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of an image or a clip.

    things: two different things share a row or a column, the left or top one first; several
      equal things are a scene to count.
    cells: each thing's cell in the 3 x 3 grid, 0..8 row by row.
    moving: a key of DIRECTIONS for a clip, "" for an image.
    nameless: draw the things in colours that have no name instead of their own.
    """

    things: tuple[Thing, ...]
    cells: tuple[int, ...]
    moving: str = ""
    nameless: bool = False

    @property
    def kind(self) -> str:
        """Returns "one", "two", "counts" or "motion"."""
        if self.moving:
            return "motion"
        if len(self.things) == 1:
            return "one"
        return "counts" if self.things[0] == self.things[1] else "two"

    @property
    def relation(self) -> str:
        """Returns how the first of two things relates to the second: "left of" or "above"."""
        return "left of" if self.cells[0] // 3 == self.cells[1] // 3 else "above"


ALL_THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = tuple(
    Thing(colour, SHAPES[(3 * place + 2) % len(SHAPES)]) for place, colour in enumerate(COLOURS)
)
"""Each colour and each shape occurs exactly once."""
SEEN = tuple(thing for thing in ALL_THINGS if thing not in HELD_OUT)
CORNERS_AND_CENTRE = (0, 2, 4, 6, 8)
KIND_SHARES = {"one": 0.45, "two": 0.40, "counts": 0.15}
"""Fractions of the kinds of scenes by default."""
TAUGHT_SHARES = {"one": 0.20, "two": 0.65, "counts": 0.15}
"""Fractions in pages and clean pairs: scenes of two things are the hardest, so more of them.
"""


def draw_one(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    """Draws a scene of one thing at random."""
    return Scene((pick(rng, things),), (int(rng.integers(9)),))


def draw_two(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    """Draws two things of different colour and shape at the two ends of a row or a column."""
    pair = pick_differing(rng, things, 2)
    line = int(rng.integers(3))
    return Scene(pair, (3 * line, 3 * line + 2) if rng.random() < 0.5 else (line, line + 6))


def draw_counts(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    """Draws a scene of two to four equal things."""
    count = int(rng.integers(2, 5))
    cells = rng.choice(CORNERS_AND_CENTRE, count, replace=False)
    return Scene((pick(rng, things),) * count, tuple(sorted(int(cell) for cell in cells)))


def draw_motion(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    """Draws a scene of one thing that moves."""
    return Scene((pick(rng, things),), (4,), pick(rng, tuple(DIRECTIONS)))


def draw_scene(
    rng: np.random.Generator, things: Sequence[Thing], shares: Mapping[str, float] = KIND_SHARES
) -> Scene:
    """Draws a scene without motion, its kind with the probabilities `shares`."""
    kind = rng.choice(list(shares), p=list(shares.values()))
    return {"one": draw_one, "two": draw_two, "counts": draw_counts}[str(kind)](rng, things)


def pick_differing(
    rng: np.random.Generator, things: Sequence[Thing], count: int
) -> tuple[Thing, ...]:
    """Picks things of which no two share a colour or a shape."""
    chosen: list[Thing] = []
    while len(chosen) < count:
        left = [
            t for t in things if all(t.colour != c.colour and t.shape != c.shape for c in chosen)
        ]
        if not left:
            # A dead end, where `things` is a subset of all: start again.
            chosen = []
            continue
        chosen.append(pick(rng, left))
    return tuple(chosen)


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """Picks one of the choices."""
    return choices[int(rng.integers(len(choices)))]
