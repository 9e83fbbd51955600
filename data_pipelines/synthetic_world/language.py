"""Writes captions and questions about scenes of the synthetic world, and new words for its
things.

All text follows from the scene by one grammar, in which a scene has exactly one clean caption:
so a generated caption can be scored by exact match.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.synthetic_world.scenes import PLACES, Scene, Thing, pick

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
"""Made-up words for fast concept binding: each page binds some of them to things anew."""
OPPOSITE = {"left of": "right of", "above": "below"}
FILLERS_BEFORE = ("photo of", "picture of", "drawing of", "nice", "my", "image :")
FILLERS_AFTER = ("photo", "picture", "for sale", "!")


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer.

    type: the scene's kind and what the question asks for, e.g. "one/colour".
    """

    question: str
    answer: str
    type: str


def with_article(thing: Thing) -> str:
    """Writes a thing with its article: "an orange star"."""
    return f"{'an' if str(thing)[0] in 'aeiou' else 'a'} {thing}"


def plural(shape: str) -> str:
    """Writes the plural of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def caption(scene: Scene) -> str:
    """Writes the one clean caption of a scene."""
    return _described(scene, with_article, lambda thing: f"{thing.colour} {plural(thing.shape)}")


def shape_first(scene: Scene) -> str:
    """Writes a caption with shapes before colours, for text without images.

    A language model learns to retrieve what followed a word long before it learns to retrieve
    what preceded it. Both orders teach it to retrieve by shape ("what colour is the star?") as
    well as by colour.
    """
    return _described(
        scene,
        lambda thing: f"{thing.shape} {thing.colour}",
        lambda thing: f"{plural(thing.shape)} {thing.colour}",
    )


def _described(scene: Scene, one: Callable[[Thing], str], several: Callable[[Thing], str]) -> str:
    """Describes a scene; `one` names a single thing, `several` a group of equal things."""
    first = scene.things[0]
    if scene.kind == "motion":
        return f"{one(first)} moving {scene.moving}"
    if scene.kind == "one":
        return f"{one(first)} at the {PLACES[scene.cells[0]]}"
    if scene.kind == "two":
        return f"{one(first)} {scene.relation} {one(scene.things[1])}"
    return f"{NUMBERS[len(scene.things)]} {several(first)}"


def noisy_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Writes a short, noisy caption like web alt-text: parts missing or reordered, filler
    words, but never false.
    """
    first, last = scene.things[0], scene.things[-1]
    colour, shape = first.colour, first.shape
    forms: tuple[str, ...]
    if scene.kind == "one":
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
    elif scene.kind == "two":
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
    text = pick(rng, forms)
    if rng.random() < 0.5:
        text = f"{pick(rng, FILLERS_BEFORE)} {text}"
    if rng.random() < 0.2:
        text = f"{text} {pick(rng, FILLERS_AFTER)}"
    return text


def questions(scene: Scene, rng: np.random.Generator, things: Sequence[Thing]) -> list[Question]:
    """Writes one question of each type that fits the scene.

    things: the things that a question about an absent thing may name.
    """
    first, last = scene.things[0], scene.things[-1]
    kind = scene.kind
    if kind == "motion":
        return [
            Question(f"which way does the {first.shape} move?", scene.moving, "motion/direction")
        ]
    if kind == "counts":
        return [
            Question(
                f"how many {plural(first.shape)} are there?",
                NUMBERS[len(scene.things)],
                "counts/number",
            )
        ]
    about = pick(rng, scene.things)
    asked = [colour_question(about, kind), shape_question(about, kind)]
    if kind == "one":
        absent = pick(rng, _absent_things(rng, first, things))
        named, answer = (first, "yes") if rng.random() < 0.5 else (absent, "no")
        asked.append(Question(f"where is the {first.shape}?", PLACES[scene.cells[0]], "one/place"))
        asked.append(Question(f"is there {with_article(named)}?", answer, "one/presence"))
        return asked
    relation, opposite = scene.relation, OPPOSITE[scene.relation]
    if rng.random() < 0.5:
        asked.append(
            Question(f"what is {relation} the {last.shape}?", with_article(first), "two/relation")
        )
    else:
        asked.append(
            Question(f"what is {opposite} the {first.shape}?", with_article(last), "two/relation")
        )
    (one, other), said = (
        pick(rng, ((first, last), (last, first))),
        pick(rng, (relation, opposite)),
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


def colour_question(about: Thing, kind: str) -> Question:
    """Writes the question that asks for a thing's colour, given its shape."""
    return Question(f"what colour is the {about.shape}?", about.colour, f"{kind}/colour")


def shape_question(about: Thing, kind: str) -> Question:
    """Writes the question that asks for a thing's shape, given its colour."""
    return Question(f"what shape is {about.colour}?", about.shape, f"{kind}/shape")


def random_question(scene: Scene, rng: np.random.Generator, things: Sequence[Thing]) -> Question:
    """Draws one of the scene's questions, each type with the same probability."""
    return pick(rng, questions(scene, rng, things))


def _absent_things(rng: np.random.Generator, thing: Thing, things: Sequence[Thing]) -> list[Thing]:
    """Returns things other than `thing` that share, at random, its colour, its shape or
    neither.
    """
    others = [t for t in things if t != thing]
    alike = pick(rng, ((True, False), (False, True), (False, False)))
    return [
        t for t in others if (t.colour == thing.colour, t.shape == thing.shape) == alike
    ] or others


def output_text(scene: Scene) -> str:
    """Writes a page's text after an image, as a caption in the prompt format."""
    return f"Output: {caption(scene)}"


def question_text(question: Question) -> str:
    """Writes a page's text after an image, as a question and answer in the prompt format."""
    return f"Question: {question.question} Answer: {question.answer}"


def naming_text(word: str, known: str = "") -> str:
    """Writes a page's text after an image that binds a new word to it, after `known` if given.

    The new word directly follows what it names, an image or one known word. So the copying
    that the language model learns from text alone carries over to images, once an image acts
    like a word. After two known words it would learn to attend two words back, where a page
    has no image.
    """
    return f" {known} {word}" if known else f" {word}"
