"""The embedded synthetic world: coloured shapes on a dark ground, their captions, questions, clips
and pages. Pure functions of a seed.

A scene says what is in an image, `render` draws it, and everything that is written about it
follows from the scene by one grammar in which a scene has exactly one clean caption. HELD_OUT
names the colour-shape pairs that no image of training, validation or test shows; text may
name them. In every image of an `unseen` split everything is of a held-out pair.
"""

import dataclasses
import functools
import io
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")

SIZE = 48
"""Side of every image in pixels."""
FRAMES = 8
"""Frames of a clip, one a second."""
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
NAMELESS = 0.5
"""Share of the images with short captions whose things have colours that no text has a word
for, and of which only shapes, places and numbers
are told: shapes are then learned whatever their colour."""
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
NUMBERS = {2: "two", 3: "three", 4: "four"}
WORDS = (
    "dax",
    "wug",
    "blick",
    "toma",
    "fep",
    "zup",
    "gazzer",
    "kiki",
    "bouba",
    "modi",
    "pabu",
    "dofa",
    "tiku",
    "lorp",
    "mib",
    "nalo",
    "rin",
    "sib",
    "tulver",
    "vash",
    "wiss",
    "yad",
    "zorg",
    "blap",
    "crell",
    "drin",
    "floop",
    "glim",
    "hask",
    "jop",
    "kern",
    "larn",
    "murk",
    "noop",
    "plim",
    "quee",
    "runk",
    "skov",
    "trell",
    "vint",
)
"""New words that pages bind to things; each page binds them anew."""


@dataclasses.dataclass(frozen=True)
class Thing:
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an image or a clip shows.

    Two things stand in one row or one column, named left first or top first; several equal
    things make a count.
    cells: each thing's place in the 3 x 3 grid. moving: a key of DIRECTIONS for a clip, else
    "". nameless: the things are drawn in colours that have no name, not in their own.
    """

    things: tuple[Thing, ...]
    cells: tuple[int, ...]
    moving: str = ""
    nameless: bool = False

    @property
    def sort(self) -> str:
        """one, two, counts or motion."""
        if self.moving:
            return "motion"
        if len(self.things) == 1:
            return "one"
        return "counts" if self.things[0] == self.things[1] else "two"

    @property
    def relation(self) -> str:
        """Of the first of two things to the second."""
        return "left of" if self.cells[0] // 3 == self.cells[1] // 3 else "above"


@dataclasses.dataclass(frozen=True)
class Question:
    """`type` is the scene's sort and what is asked for, as in one/colour."""

    question: str
    answer: str
    type: str


ALL_THINGS = tuple(Thing(colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = tuple(
    Thing(colour, SHAPES[(3 * place + 2) % len(SHAPES)]) for place, colour in enumerate(COLOURS)
)
"""One shape of every colour, one colour of every shape."""
SEEN = tuple(thing for thing in ALL_THINGS if thing not in HELD_OUT)
OPPOSITE = {"left of": "right of", "above": "below"}
CORNERS_AND_CENTRE = (0, 2, 4, 6, 8)
SORTS = {"one": 0.45, "two": 0.40, "counts": 0.15}
"""Shares of scenes among images."""
TAUGHT = {"one": 0.20, "two": 0.65, "counts": 0.15}
"""Shares among images of pages and of clean captions: two things are the hardest to tell."""


FILLERS_BEFORE = ("photo of", "picture of", "drawing of", "nice", "my", "image :")
FILLERS_AFTER = ("photo", "picture", "for sale", "!")


# Scenes.


def draw_one(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    return Scene((_pick(rng, things),), (int(rng.integers(9)),))


def draw_two(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    """Two things of different colour and shape at the two ends of a row or a column."""
    pair = differing(rng, things, 2)
    line = int(rng.integers(3))
    return Scene(pair, (3 * line, 3 * line + 2) if rng.random() < 0.5 else (line, line + 6))


def draw_counts(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    count = int(rng.integers(2, 5))
    cells = rng.choice(CORNERS_AND_CENTRE, count, replace=False)
    return Scene((_pick(rng, things),) * count, tuple(sorted(int(cell) for cell in cells)))


def draw_motion(rng: np.random.Generator, things: Sequence[Thing]) -> Scene:
    return Scene((_pick(rng, things),), (4,), _pick(rng, tuple(DIRECTIONS)))


def draw_scene(
    rng: np.random.Generator, things: Sequence[Thing], sorts: Mapping[str, float] = SORTS
) -> Scene:
    sort = rng.choice(list(sorts), p=list(sorts.values()))
    return {"one": draw_one, "two": draw_two, "counts": draw_counts}[str(sort)](rng, things)


def differing(rng: np.random.Generator, things: Sequence[Thing], count: int) -> tuple[Thing, ...]:
    """Things of which no two share a colour or a shape."""
    chosen: list[Thing] = []
    while len(chosen) < count:
        left = [
            t for t in things if all(t.colour != c.colour and t.shape != c.shape for c in chosen)
        ]
        if not left:
            chosen = []
            continue
        chosen.append(_pick(rng, left))
    return tuple(chosen)


# Images.

FINE = 4
"""Shapes are drawn this many times larger, then averaged down."""
PATCH = 28
"""Side in pixels of the patch that holds one shape, with room for its place within a pixel."""


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8 [48, 48, 3]: the scene's things with random shade, size and place (within 2 pixels)
    on a dark, slightly noisy ground.
    """
    small = scene.sort == "counts"
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
    """8 frames uint8 [48, 48, 3] in which the thing crosses the image in its direction."""
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
    """The image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _centre(cell: int) -> np.ndarray:
    return np.array([11.0 + 13.0 * (cell % 3), 11.0 + 13.0 * (cell // 3)])


def _ground(rng: np.random.Generator) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), rng.uniform(25.0, 75.0)) + rng.uniform(-4.0, 4.0, 3)


def _nameless(rng: np.random.Generator) -> np.ndarray:
    """Any colour that is unlike all that have a name, and unlike the ground."""
    while True:
        colour = rng.uniform(0.0, 255.0, 3)
        if np.max(colour) > 140 and all(
            np.linalg.norm(colour - named) > 75 for named in COLOURS.values()
        ):
            return colour


def _shade(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return colour * rng.uniform(0.9, 1.0) + rng.uniform(-10.0, 10.0, 3)


def _pixels(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noisy = canvas + rng.integers(-2, 3, (SIZE, SIZE, 1))
    return noisy.clip(0, 255).astype(np.uint8)


def _paint(
    canvas: np.ndarray, shape: str, colour: np.ndarray, centre: np.ndarray, radius: float
) -> None:
    """Blends one shape into float [48, 48, 3]; centre is (x, y)."""
    corner = np.round(centre - PATCH / 2).astype(int)
    mask = Image.new("L", (PATCH * FINE, PATCH * FINE))
    _OUTLINES[shape](ImageDraw.Draw(mask), (centre - corner) * FINE, radius * FINE)
    cover = np.asarray(mask.reduce(FINE), np.float64)[..., None] / 255
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


# Language.


def a(thing: Thing) -> str:
    """The thing with its article."""
    return f"{'an' if str(thing)[0] in 'aeiou' else 'a'} {thing}"


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def caption(scene: Scene) -> str:
    """The one clean caption of a scene."""
    return _told(scene, a, lambda thing: f"{thing.colour} {plural(thing.shape)}")


def shape_first(scene: Scene) -> str:
    """A scene told with shapes before colours, for text alone: a language model looks up what
    follows a word long before what precedes it, and must learn to look up by shape ("what
    colour is the star?") as well as by colour.
    """
    return _told(
        scene,
        lambda thing: f"{thing.shape} {thing.colour}",
        lambda thing: f"{plural(thing.shape)} {thing.colour}",
    )


def _told(scene: Scene, one: Callable[[Thing], str], several: Callable[[Thing], str]) -> str:
    """A scene, with what to call one thing and several equal ones."""
    first = scene.things[0]
    if scene.sort == "motion":
        return f"{one(first)} moving {scene.moving}"
    if scene.sort == "one":
        return f"{one(first)} at the {PLACES[scene.cells[0]]}"
    if scene.sort == "two":
        return f"{one(first)} {scene.relation} {one(scene.things[1])}"
    return f"{NUMBERS[len(scene.things)]} {several(first)}"


def noisy_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A short caption as people write them on the web: parts left out or in another order,
    words that say nothing; never wrong.
    """
    first, last = scene.things[0], scene.things[-1]
    colour, shape = first.colour, first.shape
    forms: tuple[str, ...]
    if scene.sort == "one":
        place = PLACES[scene.cells[0]]
        forms = (
            str(first),
            shape,
            colour,
            f"{shape} {place}",
            f"{colour} {place}",
            f"{shape} , {colour}",
            f"{place} : {shape}",
            caption(scene),
        )
    elif scene.sort == "two":
        both = first, last
        one, other = both if rng.random() < 0.5 else both[::-1]
        forms = (
            f"{one.shape} and {other.shape}",
            f"{one} and {other}",
            f"{one.colour} and {other.colour}",
            f"{one.shape} , {other}",
            f"{first.shape} {scene.relation} {last.shape}",
            f"{first} {scene.relation} {last}",
            caption(scene),
        )
    else:
        number, many = NUMBERS[len(scene.things)], plural(shape)
        forms = (
            f"{number} {many}",
            f"{colour} {many}",
            many,
            f"{number} {colour} {many}",
            f"{many} , {number}",
        )
    text = _pick(rng, forms)
    if rng.random() < 0.5:
        text = f"{_pick(rng, FILLERS_BEFORE)} {text}"
    if rng.random() < 0.2:
        text = f"{text} {_pick(rng, FILLERS_AFTER)}"
    return text


def questions(scene: Scene, rng: np.random.Generator, things: Sequence[Thing]) -> list[Question]:
    """One question of every type that fits the scene.

    A question about something that is not there names one of `things`.
    """
    first, last = scene.things[0], scene.things[-1]
    sort = scene.sort
    if sort == "motion":
        return [
            Question(f"which way does the {first.shape} move?", scene.moving, "motion/direction")
        ]
    if sort == "counts":
        return [
            Question(
                f"how many {plural(first.shape)} are there?",
                NUMBERS[len(scene.things)],
                "counts/number",
            )
        ]
    about = _pick(rng, scene.things)
    asked = [_colour_question(about, sort), _shape_question(about, sort)]
    if sort == "one":
        absent = _pick(rng, _near(rng, first, things))
        named, answer = (first, "yes") if rng.random() < 0.5 else (absent, "no")
        asked.append(Question(f"where is the {first.shape}?", PLACES[scene.cells[0]], "one/place"))
        asked.append(Question(f"is there {a(named)}?", answer, "one/presence"))
        return asked
    relation, opposite = scene.relation, OPPOSITE[scene.relation]
    if rng.random() < 0.5:
        asked.append(Question(f"what is {relation} the {last.shape}?", a(first), "two/relation"))
    else:
        asked.append(Question(f"what is {opposite} the {first.shape}?", a(last), "two/relation"))
    (one, other), said = (
        _pick(rng, ((first, last), (last, first))),
        _pick(rng, (relation, opposite)),
    )
    true = (one is first) == (said == relation)
    asked.append(
        Question(
            f"is the {one.shape} {said} the {other.shape}?",
            "yes" if true else "no",
            "two/order",
        )
    )
    return asked


def _colour_question(about: Thing, sort: str) -> Question:
    return Question(f"what colour is the {about.shape}?", about.colour, f"{sort}/colour")


def _shape_question(about: Thing, sort: str) -> Question:
    return Question(f"what shape is {about.colour}?", about.shape, f"{sort}/shape")


def ask(scene: Scene, rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    """One question about the scene, every type alike."""
    return _pick(rng, questions(scene, rng, things))


def _near(rng: np.random.Generator, thing: Thing, things: Sequence[Thing]) -> list[Thing]:
    """Things that are not `thing`: of its colour, of its shape, or of neither."""
    others = [t for t in things if t != thing]
    alike = _pick(rng, ((True, False), (False, True), (False, False)))
    return [
        t for t in others if (t.colour == thing.colour, t.shape == thing.shape) == alike
    ] or others


def output_text(scene: Scene) -> str:
    """A chunk of a captioning page."""
    return f"Output: {caption(scene)}"


def question_text(question: Question) -> str:
    """A chunk of a page of questions."""
    return f"Question: {question.question} Answer: {question.answer}"


def naming_text(word: str, known: str = "") -> str:
    """A chunk of a page that binds new words; with a known word, that is said first.

    The new word follows at once on what it names, an image or one known word: what a language
    model learns of binding in text then needs nothing but an image that reads like a word.
    With two known words it would learn to look two words back, where a page has no image.
    """
    return f" {known} {word}" if known else f" {word}"


# Records.

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class WorldRecord:
    """A record and the scenes its images show."""

    record: Fields
    scenes: tuple[Scene, ...] = ()


def pair(
    rng: np.random.Generator,
    things: Sequence[Thing],
    draw: Callable[..., Scene] = draw_scene,
    tell: Callable[[Scene], str] = caption,
) -> WorldRecord:
    scene = draw(rng, things)
    return WorldRecord({"image": png(render(scene, rng)), "captions": [tell(scene)]}, (scene,))


def noisy_pair(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    scene = dataclasses.replace(draw_scene(rng, things), nameless=bool(rng.random() < NAMELESS))
    text = noisy_caption(scene, rng)
    while scene.nameless and any(thing.colour in text for thing in scene.things):
        text = noisy_caption(scene, rng)
    return WorldRecord({"image": png(render(scene, rng)), "captions": [text]}, (scene,))


def clip(rng: np.random.Generator, things: Sequence[Thing], plain: bool = False) -> WorldRecord:
    """A clip with its caption, which (unless `plain`) has the form it has on pages: one prompt
    for all captions.
    """
    scene = draw_motion(rng, things)
    captions = [caption(scene) if plain else output_text(scene)]
    return WorldRecord(
        {"frames": [png(p) for p in render_clip(scene, rng)], "fps": 1.0, "captions": captions},
        (scene,),
    )


def question(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    scene = draw_scene(rng, things)
    asked = ask(scene, rng, things)
    fields = {
        "frames": [png(render(scene, rng))],
        "question": asked.question,
        "answers": [asked.answer],
        "type": asked.type,
    }
    return WorldRecord(fields, (scene,))


def page(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    """Images with captions (15 in 100), questions (65 in 100), or new words bound to what
    they show.

    Two thirds of the pages of captions or questions begin with an example that has no image.
    It tells of any thing, half of the time of one
    that no image shows: what the model trains on text must not learn that there is no thing
    but those in its images.
    """
    sort = rng.random()
    if sort >= 0.8:
        shown, known, new = _binding(rng, things, int(rng.integers(6, 13)))
        texts = [
            naming_text(word, name if rng.random() < 0.5 else "")
            for name, word in zip(known, new, strict=True)
        ]
        return _page(rng, [Scene((thing,), (int(rng.integers(9)),)) for thing in shown], texts)
    count = int(rng.integers(4, 9))
    tell = output_text if sort < 0.15 else lambda scene: question_text(ask(scene, rng, things))
    scenes = [draw_scene(rng, things, TAUGHT) for _ in range(count)]
    opening = (
        tell(draw_scene(rng, _pick(rng, (ALL_THINGS, HELD_OUT)), TAUGHT))
        if rng.random() < 2 / 3
        else ""
    )
    return _page(rng, scenes, [tell(scene) for scene in scenes], opening)


def binding_page(
    rng: np.random.Generator, things: Sequence[Thing], supports: int = 32
) -> WorldRecord:
    """Two words bound to two things: 32 supports and then the query, whose chunk names its
    word.

    Supports come in twos, one of each word in random order, so that the last s before the query
    are balanced (s = 1 has one word).
    """
    pair_of_things = differing(rng, things, 2)
    words = [str(word) for word in rng.choice(WORDS, 2, replace=False)]
    order = [int(i) for _ in range(supports // 2) for i in rng.permutation(2)]
    order.append(int(rng.integers(2)))
    scenes = [Scene((pair_of_things[i],), (int(rng.integers(9)),)) for i in order]
    return _page(rng, scenes, [naming_text(words[i]) for i in order])


def _binding(
    rng: np.random.Generator, things: Sequence[Thing], count: int
) -> tuple[list[Thing], list[str], list[str]]:
    """What a page or text that binds two to four new words shows: things in their order, the
    known word for each, the new word for each.

    Things differ in colour and in shape; the known word is the colour throughout, or the shape.
    """
    number = int(rng.integers(2, 5))
    named = dict(
        zip(
            differing(rng, things, number),
            (str(word) for word in rng.choice(WORDS, number, replace=False)),
            strict=True,
        )
    )
    known = _pick(rng, (lambda thing: thing.colour, lambda thing: thing.shape))
    shown = [_pick(rng, tuple(named)) for _ in range(count)]
    return shown, [known(thing) for thing in shown], [named[thing] for thing in shown]


def _page(
    rng: np.random.Generator, scenes: Sequence[Scene], texts: Sequence[str], opening: str = ""
) -> WorldRecord:
    return WorldRecord(
        {"texts": [opening, *texts], "images": [png(render(scene, rng)) for scene in scenes]},
        tuple(scenes),
    )


def document(rng: np.random.Generator, things: Sequence[Thing] = ALL_THINGS) -> WorldRecord:
    """Text that mirrors the pages, with a description of the scene in the place of its image,
    and rhymes.

    Half of the documents are lines, in the others the image tag stands before each description
    as on a page, so that the language model has met the tag before it is frozen. Rhymes are a
    few random words said again and again: copying is what binding is learned from, and it is
    learned soonest where there is little to choose from. What questions take is learned from
    lists of many things.
    """
    sort, tagged = rng.random(), rng.random() < 0.5
    if sort < 0.25:
        return WorldRecord({"text": _rhyme(rng)})
    if sort < 0.50:
        return namings(rng, things, tagged)
    if sort < 0.67:
        return lookups(rng, things, tagged)
    lines = []
    for _ in range(int(rng.integers(2, 5))):
        scene = draw_motion(rng, things) if rng.random() < 0.08 else draw_scene(rng, things, TAUGHT)
        told = [output_text(scene)] if sort < 0.75 else _some_questions(rng, scene, things)
        description = caption(scene) if rng.random() < 0.5 else shape_first(scene)
        lines.append(f"{description}. {' '.join(told)}")
    return WorldRecord(
        {"text": "".join(f"<image>{line}" for line in lines) if tagged else "\n".join(lines)}
    )


def _some_questions(rng: np.random.Generator, scene: Scene, things: Sequence[Thing]) -> list[str]:
    """One to three different questions about a scene: what is asked must be found in what was
    said, not guessed from its form.
    """
    asked = questions(scene, rng, things)
    return [
        question_text(asked[place])
        for place in rng.permutation(len(asked))[: int(rng.integers(1, 4))]
    ]


def namings(
    rng: np.random.Generator, things: Sequence[Thing] = ALL_THINGS, tagged: bool = True
) -> WorldRecord:
    """4 to 16 new words after known words, which stand for images: what binding takes, in
    text alone.
    """
    _, known, new = _binding(rng, things, int(rng.integers(4, 17)))
    lines = [naming_text(word, name) for name, word in zip(known, new, strict=True)]
    return WorldRecord(
        {"text": "".join(f"<image>{line}" for line in lines) if tagged else ".".join(lines)}
    )


def lookups(
    rng: np.random.Generator, things: Sequence[Thing] = ALL_THINGS, tagged: bool = True
) -> WorldRecord:
    """Three to six things told one after the other, then ten questions about the colour or
    shape of one of them, many cut to their last word.

    Of two things the answer can be guessed half of the time, and a language model may rest
    there; of many it must be looked up. What is to
    be looked up stands right before the answer of a short question: there it is learned first.
    """
    told = differing(rng, things, int(rng.integers(3, 7)))
    colours_first = rng.random() < 0.5
    listed = (
        ", ".join(a(thing) if colours_first else f"{thing.shape} {thing.colour}" for thing in told)
        + "."
    )
    asked = [
        _pick(rng, (_colour_question, _shape_question))(_pick(rng, told), "many") for _ in range(10)
    ]
    texts = [
        f"{one.question.split()[-1]} {one.answer}" if rng.random() < 0.6 else question_text(one)
        for one in asked
    ]
    return WorldRecord({"text": " ".join([("<image>" if tagged else "") + listed, *texts])})


def _rhyme(rng: np.random.Generator) -> str:
    """3 to 12 words of all kinds, said as often as 60 words allow; the first is no new word,
    since those are one piece only after a space.
    """
    known = (*COLOURS, *SHAPES)
    words = [
        _pick(rng, known),
        *(_pick(rng, (*known, *WORDS)) for _ in range(int(rng.integers(2, 12)))),
    ]
    return "\n".join([" ".join(words)] * min(60 // len(words), 8))


# Datasets.


@dataclasses.dataclass(frozen=True)
class WorldDataset:
    """One dataset of the world: its kind, how a record is drawn from things, and how many each
    split holds.
    """

    kind: str
    draw: Callable[[np.random.Generator, Sequence[Thing]], WorldRecord]
    sizes: dict[str, int]
    about: str


HELD_OUT_SPLIT = "unseen"
_taught = functools.partial(draw_scene, sorts=TAUGHT)
_TESTS = {"test": 300, HELD_OUT_SPLIT: 300}
DATASETS: dict[str, WorldDataset] = {
    "align": WorldDataset(
        "pairs", noisy_pair, {"train": 8_000, "validation": 300}, "short noisy captions"
    ),
    "ltip": WorldDataset(
        "pairs",
        functools.partial(pair, draw=_taught, tell=output_text),
        {"train": 16_000, "validation": 300},
        "clean captions",
    ),
    "vtp": WorldDataset(
        "videos", clip, {"train": 2_500, "validation": 200}, "clips of one moving thing"
    ),
    "m3w": WorldDataset(
        "pages",
        page,
        {"train": 3_000, "validation": 200},
        "pages of captions, questions and new words",
    ),
    "text": WorldDataset(
        "text",
        lambda rng, _: document(rng),
        {"train": 20_000, "validation": 200},
        "text that mirrors the pages",
    ),
    "namings": WorldDataset(
        "text",
        lambda rng, _: namings(rng),
        {"validation": 200},
        "new words bound in text alone",
    ),
    "lookups": WorldDataset(
        "text",
        lambda rng, _: lookups(rng),
        {"validation": 200},
        "many things and questions about them",
    ),
    "caption_one": WorldDataset(
        "pairs", functools.partial(pair, draw=draw_one), _TESTS, "images of one thing"
    ),
    "caption_two": WorldDataset(
        "pairs", functools.partial(pair, draw=draw_two), _TESTS, "images of two things"
    ),
    "vqa": WorldDataset("questions", question, _TESTS, "questions about images"),
    "motion": WorldDataset(
        "videos",
        functools.partial(clip, plain=True),
        {"test": 200, HELD_OUT_SPLIT: 200},
        "clips to caption",
    ),
    "binding": WorldDataset(
        "pages", binding_page, {"test": 200}, "two new words, 32 supports and a query"
    ),
}


def make_record(dataset: str, split: str, index: int, seed: int = 0) -> WorldRecord:
    """Record `index` of a split with its scenes: a pure function of its arguments."""
    spec = DATASETS[dataset]
    rng = np.random.default_rng([seed, zlib.crc32(f"{dataset}/{split}".encode()), index])
    made = spec.draw(rng, HELD_OUT if split == HELD_OUT_SPLIT else SEEN)
    return dataclasses.replace(made, record={"id": f"{dataset}/{split}/{index}", **made.record})


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
