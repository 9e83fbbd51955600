"""Makes the records of the synthetic world: pairs, clips, questions, pages and texts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.synthetic_world.language import (
    WORDS,
    caption,
    colour_question,
    naming_text,
    noisy_caption,
    output_text,
    question_text,
    questions,
    random_question,
    shape_first,
    shape_question,
    with_article,
)
from data_pipelines.synthetic_world.rendering import png, render, render_clip
from data_pipelines.synthetic_world.scenes import (
    ALL_THINGS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    TAUGHT_SHARES,
    Scene,
    Thing,
    draw_motion,
    draw_scene,
    pick,
    pick_differing,
)

NAMELESS = 0.5
"""Fraction of noisy pairs drawn in colours that have no name.

Their captions mention shape, position and number only, so that the encoder learns shapes
independently of colour.
"""

Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class WorldRecord:
    """A record's fields and the scenes that its images show, one per image or clip."""

    record: Fields
    scenes: tuple[Scene, ...] = ()


def pair(
    rng: np.random.Generator,
    things: Sequence[Thing],
    draw: Callable[..., Scene] = draw_scene,
    describe: Callable[[Scene], str] = caption,
) -> WorldRecord:
    """Makes an image with its caption, by default the clean one."""
    scene = draw(rng, things)
    return WorldRecord({"image": png(render(scene, rng)), "captions": [describe(scene)]}, (scene,))


def noisy_pair(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    """Makes an image with a short, noisy caption like web alt-text."""
    scene = dataclasses.replace(draw_scene(rng, things), nameless=bool(rng.random() < NAMELESS))
    text = noisy_caption(scene, rng)
    while scene.nameless and any(thing.colour in text for thing in scene.things):
        text = noisy_caption(scene, rng)
    return WorldRecord({"image": png(render(scene, rng)), "captions": [text]}, (scene,))


def clip(rng: np.random.Generator, things: Sequence[Thing], plain: bool = False) -> WorldRecord:
    """Makes a clip with its caption; unless `plain`, in the prompt format that pages use too,
    so that one prompt works for images and clips.
    """
    scene = draw_motion(rng, things)
    captions = [caption(scene) if plain else output_text(scene)]
    return WorldRecord(
        {"frames": [png(p) for p in render_clip(scene, rng)], "fps": 1.0, "captions": captions},
        (scene,),
    )


def question(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    """Makes an image with one question and its answer."""
    scene = draw_scene(rng, things)
    asked = random_question(scene, rng, things)
    fields = {
        "frames": [png(render(scene, rng))],
        "question": asked.question,
        "answers": [asked.answer],
        "type": asked.type,
    }
    return WorldRecord(fields, (scene,))


def page(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    """Makes a page of images with captions (15 %), with questions (65 %), or with new words
    bound to what they show (20 %).

    Two thirds of the caption and question pages begin with a text-only example, half of these
    about a held-out thing that no image shows. Otherwise the model could learn that only the
    things in its training images exist.
    """
    sort = rng.random()
    if sort >= 0.8:
        shown, known, new = _bind_words(rng, things, int(rng.integers(6, 13)))
        texts = [
            naming_text(word, name if rng.random() < 0.5 else "")
            for name, word in zip(known, new, strict=True)
        ]
        return _page(rng, [Scene((thing,), (int(rng.integers(9)),)) for thing in shown], texts)
    count = int(rng.integers(4, 9))
    describe = (
        output_text
        if sort < 0.15
        else lambda scene: question_text(random_question(scene, rng, things))
    )
    scenes = [draw_scene(rng, things, TAUGHT_SHARES) for _ in range(count)]
    opening = (
        describe(draw_scene(rng, pick(rng, (ALL_THINGS, HELD_OUT)), TAUGHT_SHARES))
        if rng.random() < 2 / 3
        else ""
    )
    return _page(rng, scenes, [describe(scene) for scene in scenes], opening)


def binding_page(
    rng: np.random.Generator, things: Sequence[Thing], supports: int = 32
) -> WorldRecord:
    """Makes a page for fast concept binding: `supports` images of two things, each with its
    new word, then the query image with its word.

    Supports come in pairs, one of each word in random order, so that the last s before the
    query are balanced for every even s.
    """
    pair_of_things = pick_differing(rng, things, 2)
    words = [str(word) for word in rng.choice(WORDS, 2, replace=False)]
    order = [int(i) for _ in range(supports // 2) for i in rng.permutation(2)]
    order.append(int(rng.integers(2)))
    scenes = [Scene((pair_of_things[i],), (int(rng.integers(9)),)) for i in order]
    return _page(rng, scenes, [naming_text(words[i]) for i in order])


def _bind_words(
    rng: np.random.Generator, things: Sequence[Thing], count: int
) -> tuple[list[Thing], list[str], list[str]]:
    """Binds two to four new words to things that differ in both colour and shape.

    Returns: (the `count` things shown, the known word of each, the new word of each). Known
      words are all colours or all shapes.
    """
    number = int(rng.integers(2, 5))
    named = dict(
        zip(
            pick_differing(rng, things, number),
            (str(word) for word in rng.choice(WORDS, number, replace=False)),
            strict=True,
        )
    )
    known = pick(rng, (lambda thing: thing.colour, lambda thing: thing.shape))
    shown = [pick(rng, tuple(named)) for _ in range(count)]
    return shown, [known(thing) for thing in shown], [named[thing] for thing in shown]


def _page(
    rng: np.random.Generator, scenes: Sequence[Scene], texts: Sequence[str], opening: str = ""
) -> WorldRecord:
    return WorldRecord(
        {"texts": [opening, *texts], "images": [png(render(scene, rng)) for scene in scenes]},
        tuple(scenes),
    )


def document(rng: np.random.Generator, things: Sequence[Thing] = ALL_THINGS) -> WorldRecord:
    """Makes a document for the language model: rhymes, new words, lists of things with
    questions, or pages with a description in place of each image.

    Half of the documents have an image tag before each description, as pages do, so that the
    language model has seen the tag before it is frozen. Rhymes repeat a few random words: they
    teach copying (induction), which fast concept binding needs, soonest with few words to
    choose from. Lists of many things teach retrieval, which answering questions needs.
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
        scene = (
            draw_motion(rng, things)
            if rng.random() < 0.08
            else draw_scene(rng, things, TAUGHT_SHARES)
        )
        told = [output_text(scene)] if sort < 0.75 else _some_questions(rng, scene, things)
        description = caption(scene) if rng.random() < 0.5 else shape_first(scene)
        lines.append(f"{description}. {' '.join(told)}")
    return WorldRecord(
        {"text": "".join(f"<image>{line}" for line in lines) if tagged else "\n".join(lines)}
    )


def _some_questions(rng: np.random.Generator, scene: Scene, things: Sequence[Thing]) -> list[str]:
    """Writes one to three different questions about a scene; their varying types make guessing
    from the form of the text useless.
    """
    asked = questions(scene, rng, things)
    return [
        question_text(asked[place])
        for place in rng.permutation(len(asked))[: int(rng.integers(1, 4))]
    ]


def namings(
    rng: np.random.Generator, things: Sequence[Thing] = ALL_THINGS, tagged: bool = True
) -> WorldRecord:
    """Makes a text of 4 to 16 known words, each followed by its new word: fast concept binding
    in text alone, with known words in place of images.
    """
    _, known, new = _bind_words(rng, things, int(rng.integers(4, 17)))
    lines = [naming_text(word, name) for name, word in zip(known, new, strict=True)]
    return WorldRecord(
        {"text": "".join(f"<image>{line}" for line in lines) if tagged else ".".join(lines)}
    )


def lookups(
    rng: np.random.Generator, things: Sequence[Thing] = ALL_THINGS, tagged: bool = True
) -> WorldRecord:
    """Makes a text that lists three to six things, then asks ten questions about the colour or
    shape of one of them, many shortened to their last word.

    With two things a model can guess right half of the time and may stop learning there; with
    many it has to retrieve. In a short question the key is directly before the answer, where
    retrieval is learned first.
    """
    told = pick_differing(rng, things, int(rng.integers(3, 7)))
    colours_first = rng.random() < 0.5
    listed = (
        ", ".join(
            with_article(thing) if colours_first else f"{thing.shape} {thing.colour}"
            for thing in told
        )
        + "."
    )
    asked = [
        pick(rng, (colour_question, shape_question))(pick(rng, told), "many") for _ in range(10)
    ]
    texts = [
        f"{one.question.split()[-1]} {one.answer}" if rng.random() < 0.6 else question_text(one)
        for one in asked
    ]
    return WorldRecord({"text": " ".join([("<image>" if tagged else "") + listed, *texts])})


def _rhyme(rng: np.random.Generator) -> str:
    """Repeats a line of 3 to 12 random words, up to 60 words in all.

    The first is a known word: new words are a single token only after a space.
    """
    known = (*COLOURS, *SHAPES)
    words = [
        pick(rng, known),
        *(pick(rng, (*known, *WORDS)) for _ in range(int(rng.integers(2, 12)))),
    ]
    return "\n".join([" ".join(words)] * min(60 // len(words), 8))
