"""Extracts the visible text and images of an HTML page, in document order.

It handles the parser's events without building a tree, so that the time is linear in the
page's size and deep nesting is no problem.
"""

import dataclasses
import math
import re

from lxml import etree

from data_pipelines.build.html_encoding import decode
from data_pipelines.build.interleaved import Verbatim

SKIPPED = {
    *("title", "script", "style", "template", "nav", "footer", "button", "select", "datalist"),
    *("textarea", "iframe", "object", "svg", "audio", "video", "noembed", "noframes", "rp"),
}
"""Elements that are skipped with their content. Not `form`, since many pages are inside one;
nor `head`: content in it implicitly begins the body.
"""
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd"),
    *("details", "dialog", "div", "dl", "dt", "fieldset", "figcaption", "figure", "form", "h1"),
    *(
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hgroup",
        "hr",
        "li",
        "listing",
        "main",
        "ol",
        "p",
    ),
    *("plaintext", "pre", "section", "summary", "table", "tbody", "tfoot", "thead", "tr", "ul"),
    "xmp",
}
"""Block elements: their text begins and ends a line."""
VERBATIM = {"listing", "plaintext", "pre", "xmp"}
"""Elements in which whitespace is preserved."""
IMAGE_TAGS = {"amp-img", "image", "img"}

LATE = ("data-src", "data-lazy-src", "data-original", "data-lazy", "data-actualsrc")
"""Attributes in which lazy-loading scripts keep an image's address; `src` is then a
placeholder.
"""
LATE_SETS = ("data-srcset", "data-lazy-srcset")
PLACES = 32
"""The most candidate addresses of an image."""
INVISIBLE = re.compile(r"(?i)(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)")
CANDIDATE = re.compile(r"[\s,]*(\S+)")
DESCRIPTOR = re.compile(r"[^,(]*(?:\([^)]*\)[^,(]*)*")

WORK = 4_000_000_000
"""Limit on nesting depth x end tags of a page, the parser's worst case: a few seconds."""

FED = 64 << 10
"""Bytes per call of the parser."""

ASIDE = "outside the text"
"""The reason for images in menus, footers and the like."""
HIDDEN = "hidden"


class TooDeep(ValueError):
    """Raised for a page nested so deeply that parsing would take minutes."""


@dataclasses.dataclass(frozen=True)
class PageImage:
    """An image on a page.

    places: its candidate addresses as written, best first.
    alternative: its alt text.
    unread: the reason why it is skipped, "" if it is not.
    """

    places: tuple[str, ...]
    alternative: str = ""
    unread: str = ""


@dataclasses.dataclass(frozen=True)
class HtmlPage:
    """The visible content of a page.

    items: texts and images in document order; newlines mark the borders of blocks.
    base: the <base href> of its addresses.
    """

    items: list[str | PageImage]
    base: str = ""


def walk(page: bytes) -> HtmlPage:
    """Parses a page.

    Raises: ValueError for an empty page, LookupError for its encoding, TooDeep.
    """
    text = decode(page)
    if not text.strip():
        raise ValueError("empty page")
    reader = _Reader(text.count("</"))
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, target=reader)
    data = text.replace("\0", "\ufffd").encode()
    for start in range(0, len(data), FED):  # In parts, so that an exception stops the parser.
        parser.feed(data[start : start + FED])
    parser.close()
    return HtmlPage(reader.items, reader.base)


class _Reader:
    """The target of the parser's events. While `_unread` is set, content is skipped."""

    def __init__(self, ends: int):
        self.items: list[str | PageImage] = []
        self.base = ""
        self._most = WORK // max(1, ends)
        self._depth = 0
        self._unread: tuple[int, str] | None = None  # Depth and reason.
        self._verbatim: int | None = None
        self._noscript: int | None = None
        self._sources: list[str] | None = None  # Of the <picture> that is open.
        self._near = _Near()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > self._most:
            raise TooDeep("nested too deep")
        if tag == "base" and not self.base:
            self.base = (attributes.get("href") or "").strip()
        if self._unread is None and (reason := _unread(tag, attributes)):
            self._unread = self._depth, reason
        if tag in IMAGE_TAGS:
            self._image(attributes)
        elif tag == "picture":
            self._sources = []
        elif tag == "source" and self._sources is not None:
            self._sources += _late(attributes) + _set(attributes.get("srcset"))
        elif tag == "noscript" and self._noscript is None:
            self._noscript = self._depth
        if self._unread is None:
            self._edge(tag)
            if tag in VERBATIM and self._verbatim is None:
                self._verbatim = self._depth

    def end(self, tag: str) -> None:
        if self._verbatim == self._depth:
            self._verbatim = None
        if self._noscript == self._depth:
            self._noscript = None
        if tag == "picture":
            if self._sources:  # There was no <img>.
                self._image({})
            self._sources = None
        if self._unread is not None and self._unread[0] == self._depth:
            self._unread = None
        if self._unread is None and (tag != "br" or self._verbatim is None):
            self._edge(tag)
        self._depth -= 1

    def data(self, text: str) -> None:
        if self._unread is not None or self._noscript is not None:
            return
        if text.strip():
            self._near = _Near()
        self._say(text)

    def close(self) -> "_Reader":
        return self

    def _say(self, text: str) -> None:
        if self._verbatim is not None:
            self.items.append(Verbatim(text.replace("\r\n", "\n")))
        else:  # Line ends of the file are blanks in HTML.
            self.items.append(re.sub(r"\s+", " ", text))

    def _edge(self, tag: str) -> None:
        edge = "\n" if tag in BLOCKS else " " if tag in ("td", "th") else ""
        if not edge or self._noscript is not None:
            return
        if self._verbatim is None:
            self.items.append(edge)
        elif tag == "br" or not (self.items and str(self.items[-1]).endswith("\n")):
            self.items.append(Verbatim(edge))

    def _image(self, attributes: dict[str, str]) -> None:
        """Adds an image: lazy-loading addresses first, then those of `srcset` and `src`."""
        sources = self._sources or []
        own = (attributes.get("src") or "").strip()
        addresses = [*_late(attributes), *sources, *_set(attributes.get("srcset")), own]
        places = tuple(dict.fromkeys(filter(None, addresses)))[:PLACES]
        reason = self._unread[1] if self._unread else ""
        image = PageImage(places, " ".join((attributes.get("alt") or "").split()), reason)
        if self._sources is not None:
            self._sources = []
        self._near.add(self.items, image, spare=self._noscript is not None)


class _Near:
    """The images since the last text. An image that is there twice, once in a <noscript>
    (`spare`) for browsers without scripts, becomes one image with the addresses of both.
    """

    def __init__(self) -> None:
        self._by_address: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._alone: set[int] = set()
        self._last: tuple[int, bool] | None = None

    def add(self, items: list[str | PageImage], image: PageImage, *, spare: bool) -> None:
        """Appends an image to the page's items, or merges it with its duplicate there."""
        twin = self._twin(image, spare)
        place = len(items) if twin is None else twin
        if twin is None:
            items.append(image)
            self._alone.add(place)
            self._last = place, spare
        else:
            other = items[twin]
            assert isinstance(other, PageImage)
            items[twin] = _one(other, image) if spare else _one(image, other)
            self._alone.remove(twin)
        for address in image.places:
            self._by_address[spare].setdefault(address, place)

    def _twin(self, image: PageImage, spare: bool) -> int | None:
        known = (self._by_address[not spare].get(address) for address in image.places)
        for place in known:
            if place in self._alone:
                return place
        if spare and self._last and not self._last[1] and self._last[0] in self._alone:
            return self._last[0]
        return None


def _one(first: PageImage, second: PageImage) -> PageImage:
    places = tuple(dict.fromkeys((*first.places, *second.places)))
    alternative = first.alternative or second.alternative
    return PageImage(places, alternative, first.unread and second.unread)


def _unread(tag: str, attributes: dict[str, str]) -> str:
    """Returns the reason why an element is skipped, "" if it is not.

    `hidden=until-found` is text of the page. `aria-hidden` hides from screen readers only.
    """
    if tag in SKIPPED:
        return ASIDE
    if attributes.get("hidden", "until-found").lower() != "until-found":
        return HIDDEN
    if tag == "dialog" and "open" not in attributes:
        return HIDDEN
    return HIDDEN if INVISIBLE.search(attributes.get("style") or "") else ""


def _late(attributes: dict[str, str]) -> list[str]:
    places = [(attributes.get(name) or "").strip() for name in LATE]
    return places + [place for name in LATE_SETS for place in _set(attributes.get(name))]


def _set(text: str | None) -> list[str]:
    """Parses a `srcset`: its addresses, largest first (HTML standard, 4.8.4.3.10)."""
    found: list[tuple[float, str]] = []
    place = 0
    while text and len(found) < PLACES and (match := CANDIDATE.match(text, place)):
        address, place = match[1], match.end()
        size = 1.0
        if address.endswith(","):
            address = address.rstrip(",")
        elif described := DESCRIPTOR.match(text, place):
            place = described.end()
            size = _size(described[0])
        if address:
            found.append((-size, address))
    return [address for _, address in sorted(found, key=lambda one: one[0])]


def _size(descriptor: str) -> float:
    """Parses the number of a descriptor such as `640w` or `2x`; 1 if there is none."""
    try:
        size = float((descriptor.split() or ["1x"])[0][:-1])
    except ValueError:
        return 1.0
    return size if math.isfinite(size) else 1.0
