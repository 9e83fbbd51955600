"""Folders of HTML pages with their pictures to a dataset of pages: text and pictures in the order of the document (paper 3.2, M3W).

Pictures are read from the folder only: what a page refers to elsewhere, on the web or by a path that leads out, is left out and counted.
"""

import dataclasses
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import lxml.html
from lxml import etree

from data_pipelines.build.files import MISSING, FileEntry, NoFile, file_entries, find, read
from data_pipelines.build.interleaved import PAGES_RULES, Shown, make_page
from data_pipelines.build.pictures import PictureRules, Unfit
from data_pipelines.build.source import DEFAULT_SHARES, Dropped, Outcome, Shares, record_id

SUFFIXES = {".html", ".htm", ".xhtml"}
SKIPPED = {
    "head", "script", "style", "noscript", "template", "nav", "footer", "button", "select", "textarea", "iframe", "object", "svg",
    "audio", "video",
}
"""Elements that hold no text of the page; nothing inside them is read. A form is none of them: many a page lies within one."""
BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "ol", "p", "pre", "section",
    "summary", "table", "tbody", "tfoot", "thead", "tr", "ul",
}
"""Elements whose text stands on lines of its own."""
CLAIM_BYTES = 1024
"""The beginning of a page in which HTML wants it to name its encoding."""
WITHIN_PAGE = re.compile("data:", re.IGNORECASE)
"""How the address of a picture begins that is written into the page itself."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An <img> of a page."""

    source: str
    alternative: str = ""


@dataclasses.dataclass(frozen=True)
class HtmlPages:
    """Pages that keep no picture are dropped. alt_text: a picture's alternative text follows it on a line of its own."""

    folders: tuple[str, ...]
    shares: Shares = DEFAULT_SHARES
    rules: PictureRules = PAGES_RULES
    alt_text: bool = False

    @property
    def kind(self) -> str:
        return "pages"

    @property
    def about(self) -> str:
        return "HTML pages with their pictures."

    @property
    def options(self) -> dict[str, Any]:
        return {"source": type(self).__name__, **dataclasses.asdict(self)}

    def entries(self) -> Sequence[FileEntry]:
        return file_entries(self.folders, SUFFIXES, "HTML page")

    def convert(self, entry: FileEntry) -> list[Outcome]:
        if entry.bad:
            return [Dropped(entry.bad)]
        root, name = pathlib.Path(entry.folder), entry.name
        try:
            items = list(walk(read(root / name)))
        except NoFile as error:
            return [Dropped(str(error))]
        except (ValueError, etree.LxmlError):
            return [Dropped("unreadable page")]
        page_id = record_id(self.folders, root, name)
        return [make_page(page_id, self.shares.split(page_id), (self._item(root, root / name, item) for item in items), self.rules)]

    def _item(self, root: pathlib.Path, page: pathlib.Path, item: "str | Picture") -> str | Shown:
        if isinstance(item, str):
            return item
        after = f"\n{item.alternative}\n" if self.alt_text and item.alternative else ""
        return Shown(lambda: read_picture(root, page, item.source, self.folders), after)


def walk(page: bytes) -> Iterator[str | Picture]:
    """Text and pictures in document order; line ends mark where blocks begin and end.

    Raises ValueError or lxml's errors where the bytes are no HTML.
    """
    if not page.strip():
        raise ValueError("empty page")
    root = lxml.html.document_fromstring(page, parser=lxml.html.HTMLParser(encoding=_encoding(page), huge_tree=True))
    skipping = None
    for event, element in etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        if event in ("comment", "pi"):
            if skipping is None and element.tail:
                yield _spaces(element.tail)
            continue
        if event == "start" and skipping is None:
            if element.tag in SKIPPED:
                skipping = element
            elif element.tag == "img":
                yield Picture(_address(element), " ".join((element.get("alt") or "").split()))
            else:
                yield _edge(element.tag) + _spaces(element.text or "")
        elif event == "end":
            if skipping is element:
                skipping = None
            if skipping is None:
                yield _edge(element.tag) + _spaces(element.tail or "")


def read_picture(
    root: pathlib.Path, page: pathlib.Path, source: str, given: Sequence[str] = ()
) -> bytes:
    """The file that an <img> of `page` means, below `root`. Raises Unfit."""
    if not source:
        raise Unfit("no address")
    if WITHIN_PAGE.match(source):
        raise Unfit("within the page")
    if re.match(r"(?i)[a-z][a-z0-9+.-]*:|//", source):
        raise Unfit("on another machine")
    bare = re.split(r"[?#]", source)[0]
    here = page.parent.relative_to(root).as_posix()
    reasons = []
    for name in dict.fromkeys((source, bare, urllib.parse.unquote(bare))):
        below = name.lstrip("/") if name.startswith("/") else f"{here}/{name}"
        try:
            return read(find((root,), below, given))
        except NoFile as error:
            reasons.append(error)
    raise next((reason for reason in reasons if str(reason) != MISSING), reasons[0])


def _address(image: etree._Element) -> str:
    """Pages that load pictures late name them in `data-src`, and have nothing or a blank within the page until then."""
    address, late = ((image.get(name) or "").strip() for name in ("src", "data-src"))
    return late if late and (not address or WITHIN_PAGE.match(address)) else address


def _encoding(page: bytes) -> str | None:
    """UTF-8 where the bytes are that, or most are of a page that claims no other, else None: lxml then looks for what the page says of itself."""
    text = page.decode("utf-8", "replace")
    if text.encode() == page:
        return "utf-8"
    claimed = re.search(rb"""(?i)(?:charset|encoding)\s*=\s*["']?([\w-]+)""", page[:CLAIM_BYTES])
    beyond_ascii = len(re.findall(r"[^\0-\x7f]", text))
    mostly = 2 * text.count("\ufffd") < beyond_ascii
    return "utf-8" if mostly and (claimed is None or claimed[1].lower() in (b"utf-8", b"utf8")) else None


def _edge(tag: object) -> str:
    return "\n" if tag in BLOCKS else " " if tag in ("td", "th") else ""


def _spaces(text: str) -> str:
    """Line ends of the file are blanks in HTML."""
    return re.sub(r"\s+", " ", text)
