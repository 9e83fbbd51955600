"""The blocks of code in README files, and the small data that their commands name.

A fenced block of language `sh` or `python` is code; one below a line `<!-- not run in tests:
REASON -->` is not run.
"""

import json
import pathlib
import random
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(
    r"(?:<!-- not run in tests: (?P<reason>[^\n]+?) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of code. reason: why tests do not run it; "" where they do."""

    file: str
    language: str
    text: str
    reason: str


def blocks(file: str) -> list[Block]:
    """The blocks of a file below the root, in order, those that are no code left out."""
    return [
        Block(file, match["language"], match["text"], match["reason"] or "")
        for match in FENCE.finditer((ROOT / file).read_text())
        if match["language"] in ("sh", "python")
    ]


def commands(text: str) -> list[str]:
    """The lines of a block of shell that are commands, continued ones joined."""
    joined = text.replace("\\\n", " ")
    return [line for line in joined.split("\n") if line.strip() and not line.startswith("#")]


def make_small_data(folder: pathlib.Path) -> None:
    """Makes what the READMEs say that a reader has: my_photos/, my_pages/, my_clips/, my_texts/
    and my_questions/.
    """
    chance = random.Random(0)
    words = [
        "".join(chance.choices("abcdefghilmnoprstu", k=chance.randint(2, 8))) for _ in range(3000)
    ]

    def sentence(length: int = 8) -> str:
        return " ".join(chance.choices(words, k=length)).capitalize() + "."

    photos, pages, clips = (folder / f"my_{name}" for name in ("photos", "pages", "clips"))
    for each in (photos, pages, clips, folder / "my_texts", folder / "my_questions"):
        each.mkdir()
    names = ["dog", *(f"photo{n}" for n in range(170))]
    for number, name in enumerate(names):
        save_image(photos / f"{name}.jpg", number)
    write_lines(
        photos / "captions.jsonl",
        [{"image": f"{name}.jpg", "captions": [sentence()]} for name in names],
    )
    for number in range(24):
        save_image(pages / f"{number}.jpg", number)
        (pages / f"{number}.html").write_text(
            f"<html><body><p>{sentence(20)}</p><img src='{number}.jpg'><p>{sentence(20)}</p></body>"
        )
    for number in range(24):
        frames = [Image.fromarray(colours(number + frame)) for frame in range(4)]
        frames[0].save(
            clips / f"{number}.gif", save_all=True, append_images=frames[1:], duration=500
        )
    write_lines(
        clips / "captions.jsonl",
        [{"video": f"{number}.gif", "captions": [sentence()]} for number in range(24)],
    )
    for number in range(12):
        text = "\n".join(sentence(12) for _ in range(120))
        (folder / "my_texts" / f"{number}.txt").write_text(text + "\n")
    for number in range(160):
        save_image(folder / "my_questions" / f"{number}.jpg", number)
    write_lines(
        folder / "my_questions" / "qa.jsonl",
        [
            {
                "image": f"{number}.jpg",
                "question": f"what is {sentence(4)[:-1].lower()}?",
                "answer": chance.choice(words),
            }
            for number in range(160)
        ],
    )


def colours(seed: int, side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.kron(patches, np.ones((side // 4, side // 4, 1), np.uint8))


def save_image(path: pathlib.Path, seed: int) -> None:
    Image.fromarray(colours(seed, 128)).save(path, quality=90)


def write_lines(path: pathlib.Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
