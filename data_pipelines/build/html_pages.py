"""Source `html_pages`: converts folders of HTML pages with their images to interleaved pages,
text and images in document order (paper 3.2, M3W).

Images are read from the folder or from data: URLs in the page. References to the web, or to
files outside the folder, are not followed; they are dropped and counted.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lxml import etree

from data_pipelines.build.files import FileEntry, FileRefused, file_entries, read
from data_pipelines.build.html_addresses import NO_ADDRESS, read_address
from data_pipelines.build.html_walk import HtmlPage, PageImage, TooDeep, walk
from data_pipelines.build.images import ImageRules, UnusableImage
from data_pipelines.build.interleaved import PAGES_RULES, ImageRef, make_page
from data_pipelines.build.source import (
    DEFAULT_SHARES,
    Converted,
    DroppedRecord,
    SplitFractions,
    record_id,
)

SUFFIXES = {".html", ".htm", ".xhtml", ".xht"}
MAX_PAGE = 32 << 20
"""Bytes. Larger pages hold embedded media rather than text."""
TOO_LARGE = f"page larger than {MAX_PAGE >> 20} MiB"
TOO_DEEP = "page nested too deep for its size"
UNREADABLE_PAGE = "unreadable page"
NOT_DECODED = "page in an encoding that is not decoded"


@dataclasses.dataclass(frozen=True)
class HtmlPages:
    """Reads HTML pages below `folders`, one record per page.

    Pages of which no image remains are dropped.
    alt_text: put an image's alternative text on a line of its own after it.
    """

    folders: tuple[str, ...]
    shares: SplitFractions = DEFAULT_SHARES
    rules: ImageRules = PAGES_RULES
    alt_text: bool = False

    @property
    def kind(self) -> str:
        return "pages"

    @property
    def about(self) -> str:
        return "HTML pages with their images."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[FileEntry]:
        """Lists the HTML files."""
        return file_entries(self.folders, SUFFIXES, "HTML page")

    def convert(self, entry: FileEntry) -> list[Converted]:
        """Converts one HTML file to a page, or to the reason why it was dropped."""
        if entry.bad:
            return [DroppedRecord(entry.bad)]
        root, name = pathlib.Path(entry.folder), entry.name
        try:
            page = _walked(root / name)
        except FileRefused as error:
            return [DroppedRecord(str(error))]
        page_id = record_id(self.folders, root, name)
        items = self._items(root, root / name, page)
        return [make_page(page_id, self.shares.split(page_id), items, self.rules)]

    def _items(
        self, root: pathlib.Path, file: pathlib.Path, page: HtmlPage
    ) -> Iterator[str | ImageRef]:
        """Yields the page's texts and references to its images, in document order."""
        for item in page.items:
            if isinstance(item, str):
                yield item
                continue
            after = f"\n{item.alternative}\n" if self.alt_text and item.alternative else ""
            reads = self._reads(root, file, page.base, item)
            yield ImageRef(reads[0], after, tuple(reads[1:]))

    def _reads(
        self, root: pathlib.Path, file: pathlib.Path, base: str, image: PageImage
    ) -> list[Callable[[], bytes]]:
        """Returns the readers of an image's candidate addresses (src, srcset, ...), best
        first.
        """
        if image.unread or not image.places:
            return [functools.partial(_refuse, image.unread or NO_ADDRESS)]
        return [
            functools.partial(read_address, root, file, place, base, self.folders)
            for place in image.places
        ]


def _walked(file: pathlib.Path) -> HtmlPage:
    """Parses an HTML file; raises FileRefused with the reason where it cannot be read."""
    data = read(file, MAX_PAGE, TOO_LARGE)
    try:
        return walk(data)
    except TooDeep as error:
        raise FileRefused(TOO_DEEP) from error
    except LookupError as error:
        raise FileRefused(NOT_DECODED) from error
    except (ValueError, etree.LxmlError) as error:
        raise FileRefused(UNREADABLE_PAGE) from error


def _refuse(reason: str) -> bytes:
    raise UnusableImage(reason)
