"""Makes a record of kind pages from interleaved text and images; shared by all sources of
pages (paper 3.2, M3W).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

from data_pipelines.build.images import ImageRules, UnusableImage
from data_pipelines.build.source import Converted, DroppedRecord, SplitRecord

PAGES_RULES = ImageRules(min_side=64, max_aspect=3.0)
MAX_IMAGES = 1_000
"""The most images of a page; a training example shows a few of them."""
MAX_BYTES = 512 << 20
"""The most bytes of a page's images: records are limited to 2 GiB."""
BEYOND = f"beyond the first {MAX_IMAGES:,} or {MAX_BYTES >> 20} MiB of a page"


class Verbatim(str):
    """Text in which whitespace is preserved, such as code."""


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """A reference to an image in a document.

    read: returns its bytes; raises UnusableImage.
    after: text to add after the image, if it is used.
    others: alternatives to `read`, tried in order until one gives a usable image.
    """

    read: Callable[[], bytes]
    after: str = ""
    others: tuple[Callable[[], bytes], ...] = ()

    def stored(self, rules: ImageRules) -> bytes:
        """Reads the image as it is stored; raises UnusableImage with the reason of the first
        candidate.
        """
        reasons = []
        for read in (self.read, *self.others):
            try:
                return rules.store(read())
            except UnusableImage as error:
                reasons.append(error)
        raise reasons[0]


def make_page(
    name: str, split: str, items: Iterable[str | ImageRef], rules: ImageRules
) -> Converted:
    """Makes a page's record of k images and k + 1 texts.

    Unusable images are left out and counted: the texts around them are joined. A page of which
    no image or no text remains is dropped.
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
                raise UnusableImage(BEYOND)
            images.append(image)
            size += len(image)
            pieces.append([item.after])
        except UnusableImage as error:
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
    """Joins the pieces of a text and normalises whitespace, except in Verbatim pieces, which
    begin and end a line.
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
    """Collapses spaces, and removes empty lines and spaces around lines."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)
