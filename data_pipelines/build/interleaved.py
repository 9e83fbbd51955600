"""Text and pictures in the order of a document to a record of kind pages: what all sources of pages have in common (paper 3.2, M3W)."""

import dataclasses
from collections.abc import Callable, Iterable

from data_pipelines.build.pictures import PictureRules, Unfit
from data_pipelines.build.source import Dropped, Example, Outcome

PAGES_RULES = PictureRules(min_side=64, max_aspect=3.0)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture of a document. read: its file, raises Unfit; after: text that follows it where it is fit."""

    read: Callable[[], bytes]
    after: str = ""


def make_page(name: str, split: str, items: Iterable[str | Shown], rules: PictureRules) -> Outcome:
    """Texts and pictures as a record; pictures that are unfit are left out and counted, and pages that keep none are dropped."""
    texts, images, unfit = [""], [], []
    for item in items:
        if isinstance(item, str):
            texts[-1] += item
            continue
        try:
            images.append(rules.store(item.read()))
            texts.append(item.after)
        except Unfit as error:
            unfit.append(str(error))
    texts = [tidy(text) for text in texts]
    if not images:
        return Dropped("page without a picture that is fit", tuple(unfit))
    if not any(texts):
        return Dropped("page without text", (*unfit, *["on a page without text"] * len(images)))
    return Example(split, {"id": name, "texts": texts, "images": images}, tuple(unfit))


def tidy(text: str) -> str:
    """Blanks joined, empty lines and the blanks around lines gone."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
