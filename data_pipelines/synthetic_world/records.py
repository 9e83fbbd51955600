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
"""Share of the images with short captions whose things have colours that no text has a word
for, and of which only shapes, places and numbers are said: shapes are then learned whatever
their colour."""

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
    describe: Callable[[Scene], str] = caption,
) -> WorldRecord:
    """Makes an image with its caption."""
    scene = draw(rng, things)
    return WorldRecord({"image": png(render(scene, rng)), "captions": [describe(scene)]}, (scene,))


def noisy_pair(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    """Makes an image with a short caption as people write them on the web."""
    scene = dataclasses.replace(draw_scene(rng, things), nameless=bool(rng.random() < NAMELESS))
    text = noisy_caption(scene, rng)
    while scene.nameless and any(thing.colour in text for thing in scene.things):
        text = noisy_caption(scene, rng)
    return WorldRecord({"image": png(render(scene, rng)), "captions": [text]}, (scene,))


def clip(rng: np.random.Generator, things: Sequence[Thing], plain: bool = False) -> WorldRecord:
    """Makes a clip with its caption, which (unless `plain`) has the form it has on pages: one
    prompt for all captions.
    """
    scene = draw_motion(rng, things)
    captions = [caption(scene) if plain else output_text(scene)]
    return WorldRecord(
        {"frames": [png(p) for p in render_clip(scene, rng)], "fps": 1.0, "captions": captions},
        (scene,),
    )


def question(rng: np.random.Generator, things: Sequence[Thing]) -> WorldRecord:
    """Makes an image with a question about it."""
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
    """Makes a page: images with captions (15 in 100), questions (65 in 100), or new words
    bound to what they show.

    Two thirds of the pages of captions or questions begin with an example that has no image.
    It tells of any thing, half of the time of one
    that no image shows: what the model trains on text must not learn that there is no thing
    but those in its images.
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
    """Makes a page of two words bound to two things: 32 supports and then the query, whose
    chunk names its word.

    Supports come in twos, one of each word in random order, so that the last s before the query
    are balanced (s = 1 has one word).
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
    """What a page or text that binds two to four new words shows: things in their order, the
    known word for each, the new word for each.

    Things differ in colour and in shape; the known word is the colour throughout, or the shape.
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
    """Makes text that mirrors the pages, with a description of the scene in the place of its
    image, and rhymes.

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
    """Makes a text of 4 to 16 new words after known words, which stand for images: what
    binding takes, in text alone.
    """
    _, known, new = _bind_words(rng, things, int(rng.integers(4, 17)))
    lines = [naming_text(word, name) for name, word in zip(known, new, strict=True)]
    return WorldRecord(
        {"text": "".join(f"<image>{line}" for line in lines) if tagged else ".".join(lines)}
    )


def lookups(
    rng: np.random.Generator, things: Sequence[Thing] = ALL_THINGS, tagged: bool = True
) -> WorldRecord:
    """Makes a text: three to six things told one after the other, then ten questions about the
    colour or shape of one of them, many cut to their last word.

    Of two things the answer can be guessed half of the time, and a language model may rest
    there; of many it must be looked up. What is to
    be looked up stands right before the answer of a short question: there it is learned first.
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
    """3 to 12 words of all kinds, said as often as 60 words allow; the first is no new word,
    since those are one piece only after a space.
    """
    known = (*COLOURS, *SHAPES)
    words = [
        pick(rng, known),
        *(pick(rng, (*known, *WORDS)) for _ in range(int(rng.integers(2, 12)))),
    ]
    return "\n".join([" ".join(words)] * min(60 // len(words), 8))
