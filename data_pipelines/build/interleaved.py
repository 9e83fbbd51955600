"""Text and images in the order of a document to a record of kind pages: what all sources of
pages have in common (paper 3.2, M3W).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

from data_pipelines.build.images import ImageRules, Unfit
from data_pipelines.build.source import Converted, DroppedRecord, SplitRecord

PAGES_RULES = ImageRules(min_side=64, max_aspect=3.0)
MAX_IMAGES = 1_000
"""Of one page; a training example holds a few of them."""
MAX_BYTES = 512 << 20
"""Of a page's images: no record of more than 2 GiB can be written."""
BEYOND = f"beyond the first {MAX_IMAGES:,} or {MAX_BYTES >> 20} MiB of a page"


class Verbatim(str):
    """Text whose blanks and lines are kept: of a program, a table, a poem."""


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """An image of a document. read: its file, raises Unfit; after: text that follows it where
    it is fit; others: where else it may lie, tried in order until a fit image is found.
    """

    read: Callable[[], bytes]
    after: str = ""
    others: tuple[Callable[[], bytes], ...] = ()

    def stored(self, rules: ImageRules) -> bytes:
        """Raises Unfit, with the reason that the first place gave."""
        reasons = []
        for read in (self.read, *self.others):
            try:
                return rules.store(read())
            except Unfit as error:
                reasons.append(error)
        raise reasons[0]


def make_page(
    name: str, split: str, items: Iterable[str | ImageRef], rules: ImageRules
) -> Converted:
    """Puts texts and images together as a record; images that are unfit are left out and
    counted, and pages that keep none are dropped.
    """
    pieces: list[list[str]] = [[]]
    images, unfit = list[bytes](), list[str]()
    size = 0
    for item in items:
        if isinstance(item, str):
            pieces[-1].append(item)
            continue
        try:
            image = item.stored(rules) if len(images) < MAX_IMAGES else b""
            if not image or size + len(image) > MAX_BYTES:
                raise Unfit(BEYOND)
            images.append(image)
            size += len(image)
            pieces.append([item.after])
        except Unfit as error:
            unfit.append(str(error))
    texts = [joined(parts) for parts in pieces]
    if not images:
        return DroppedRecord("page without an image that is fit", tuple(unfit))
    if not any(texts):
        return DroppedRecord(
            "page without text", (*unfit, *["on a page without text"] * len(images))
        )
    return SplitRecord(split, {"id": name, "texts": texts, "images": images}, tuple(unfit))


def joined(pieces: Iterable[str]) -> str:
    """Joins the pieces of a text: tidy, but for those that are Verbatim, which stand on their
    own.
    """
    parts = []
    for verbatim, run in itertools.groupby(pieces, lambda piece: isinstance(piece, Verbatim)):
        text = "".join(run)
        if verbatim:
            lines = [line.rstrip() for line in text.split("\n")]
            parts.append("\n".join(lines).strip("\n"))
        else:
            parts.append(tidy(text))
    return "\n".join(part for part in parts if part)


def tidy(text: str) -> str:
    """Tidies a text: blanks joined, empty lines and the blanks around lines gone."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
