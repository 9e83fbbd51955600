"""An HTML page as a reader sees it: text and images in the order of the document.

The parser's events are read as they come and no tree is made, so that the time is linear in the
page's bytes and elements may nest as deep as they like.
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
"""Elements that hold no text of the page; nothing inside them is read. A form is none of them:
many a page lies within one. Nor is the head: whatever else stands there begins the body.
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
"""Elements whose text stands on lines of its own."""
VERBATIM = {"listing", "plaintext", "pre", "xmp"}
"""Elements whose blanks and line ends are text."""
IMAGE_TAGS = {"amp-img", "image", "img"}

LATE = ("data-src", "data-lazy-src", "data-original", "data-lazy", "data-actualsrc")
"""Where scripts that load images late keep the address; until then `src` names a stand-in."""
LATE_SETS = ("data-srcset", "data-lazy-srcset")
PLACES = 32
"""Most addresses kept of one image."""
INVISIBLE = re.compile(r"(?i)(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)")
CANDIDATE = re.compile(r"[\s,]*(\S+)")
DESCRIPTOR = re.compile(r"[^,(]*(?:\([^)]*\)[^,(]*)*")

WORK = 4_000_000_000
"""Depth of an element times end tags of its page: what the parser may have to compare
(seconds).
"""

FED = 64 << 10
"""Bytes given to the parser at once."""

ASIDE = "outside the text"
"""Why an image of a menu, a footer or the like is left out."""
HIDDEN = "hidden"


class TooDeep(ValueError):
    """Elements nest so deep that the parser would take minutes."""


@dataclasses.dataclass(frozen=True)
class PageImage:
    """An image of a page. places: its addresses as they stand there, the likeliest first;
    unread: why it is not looked at, "" where it is.
    """

    places: tuple[str, ...]
    alternative: str = ""
    unread: str = ""


@dataclasses.dataclass(frozen=True)
class HtmlPage:
    """What a reader of a page sees. items: in document order; line ends mark where blocks
    begin and end. base: of addresses.
    """

    items: list[str | PageImage]
    base: str = ""


def walk(page: bytes) -> HtmlPage:
    """Reads a page in document order. Raises ValueError (LookupError for the encoding) where
    there is nothing to be read.
    """
    text = decode(page)
    if not text.strip():
        raise ValueError("empty page")
    reader = _Reader(text.count("</"))
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, target=reader)
    data = text.replace("\0", "\ufffd").encode()
    for start in range(0, len(data), FED):  # What `reader` raises ends the parsing between two.
        parser.feed(data[start : start + FED])
    parser.close()
    return HtmlPage(reader.items, reader.base)


class _Reader:
    """Takes the parser's events. Elements that are not read are those within `_unread`."""

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
        """Its addresses: of a late loader, then those that a browser would choose from."""
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
    """The images since the last text: one that stands there twice, once for browsers without
    scripts (`spare`, in a <noscript>), is one image with the addresses of both."""

    def __init__(self) -> None:
        self._by_address: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._alone: set[int] = set()
        self._last: tuple[int, bool] | None = None

    def add(self, items: list[str | PageImage], image: PageImage, *, spare: bool) -> None:
        """Appends an image to the page's items, or joins it to its twin there."""
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
    """Why an element is not read, "" where it is.

    What is hidden until it is looked for is text of the page; `aria-hidden` is about those who
    listen to the page, and hides nothing from those who see it.
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
    """The addresses of a `srcset`, the largest first (HTML standard, 4.8.4.3.10)."""
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
    """Of `640w` or `2x` the number, 1 where there is none."""
    try:
        size = float((descriptor.split() or ["1x"])[0][:-1])
    except ValueError:
        return 1.0
    return size if math.isfinite(size) else 1.0
