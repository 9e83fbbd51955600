"""Folders of pages to records: where images lie, and what became of every page and image."""

import base64
import os
import pathlib
import unicodedata
import urllib.parse

import numpy as np
import pytest

from data_pipelines.build import files, html_pages, interleaved
from data_pipelines.build.html_addresses import read_address
from data_pipelines.build.html_pages import HtmlPages
from data_pipelines.build.images import ImageRules, UnusableImage
from data_pipelines.build.writer import write_dataset
from tests.data_pipelines.raw import (
    ALL_TRAIN,
    accounted,
    colourful,
    huge_png,
    read,
    save,
    strings,
)

PAGE = """<!DOCTYPE html><html><head><title>not text</title><style>p {color: red}</style></head>
<body>
<nav>menu <img src="a.png"></nav>
<h1>Title
  of  it</h1><p>One <b>bold</b>word&nbsp;&amp; more<!-- a comment --> here.</p>
<script>var x = 1;</script>
<p>Before <IMG SRC="pics/a%20b.png?v=2" alt="the  picture"> after</p>
<ul><li>first<li>second</ul>
<img src="pics/a%20b.png"><table><tr><td>x</td><td>y</td></tr></table>
<img src="http://example.com/far.png"><img src="../out.png"><img src="/pics/wide.png"><img src="gone.png">
<img>
<img src="data:image/png;base64,AA">
last<br>line</body></html>"""  # noqa: E501


def test_text_and_images_in_the_order_of_the_page(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "site"
    save(root / "sub" / "pics" / "a b.png", colourful())
    save(root / "a.png", colourful())
    save(root / "pics" / "wide.png", colourful(70, 300))
    save(tmp_path / "out.png", colourful())
    (root / "sub" / "page.html").write_text(PAGE)
    (root / "bare.htm").write_text("<p>only text <img src='gone.png'></p>")
    (root / "mute.html").write_text("<img src='a.png'>")
    (root / "empty.html").write_text("  ")
    (root / "top.html").write_text('<p>a<img src="sub/../a.png"><p>b')
    (root / "climb.html").write_text(
        '<p>a<img src="../out.png"><img src="/../out.png"><img src="sub/../../out.png"><p>b'
    )
    records = accounted(
        tmp_path / "pages",
        HtmlPages((str(root),), ALL_TRAIN),
        {"page without an image that is fit": 2, "page without text": 1, "unreadable page": 1},
        {
            "aspect over 3": 1,
            "missing": 3,
            "no address": 1,
            "on a page without text": 1,
            "on another machine": 1,
            "outside the folder": 3,
            "outside the text": 1,
            "unreadable": 1,
        },
    )
    page = records["sub/page.html"]
    assert strings(page["texts"]) == [
        "Title of it\nOne boldword & more here.\nBefore",
        "after\nfirst\nsecond",
        "x y\nlast\nline",
    ]
    assert len(page["images"]) == 2


def test_alternative_text_on_request(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "site" / "a.png", colourful())
    (tmp_path / "site" / "page.html").write_text('<p>one<img src="a.png" alt="a  cat">two')
    write_dataset(
        tmp_path / "pages", HtmlPages((str(tmp_path / "site"),), ALL_TRAIN, alt_text=True)
    )
    assert strings(read(tmp_path / "pages")["page.html"]["texts"]) == ["one", "a cat\ntwo"]


@pytest.mark.parametrize(
    "base, address, name",
    [
        ("", "pics/a.png", "sub/pics/a.png"),
        ("", "pics/a.png?v=2#top", "sub/pics/a.png"),
        ("", "a%20b%3Fc.png", "sub/a b?c.png"),
        ("", "a?b.png", "sub/a?b.png"),
        ("", "pics\\a.png", "sub/pics/a.png"),
        ("", "..\\pics\\a.png", "pics/a.png"),
        ("", "\\pics\\a.png", "pics/a.png"),
        ("", "/pics/a.png", "pics/a.png"),
        ("", "pi\ncs/a.png ", "sub/pics/a.png"),
        ("", urllib.parse.quote("ü.png"), "sub/" + unicodedata.normalize("NFD", "ü.png")),
        ("", "caf%E9.png", "sub/" + os.fsdecode(b"caf\xe9.png")),
        ("assets/", "a.png", "sub/assets/a.png"),
        ("/assets/page.html", "a.png", "assets/a.png"),
        ("../", "a.png", "a.png"),
        ("assets/", "/a.png", "a.png"),
        ("https://example.com/assets/", "a.png", "assets/a.png"),
        ("https://example.com/assets/", "b.png", "sub/b.png"),
        ("https://[", "b.png", "sub/b.png"),
    ],
)
def test_an_image_is_found_by_its_address(
    base: str, address: str, name: str, tmp_path: pathlib.Path
) -> None:
    data = save(tmp_path / name, colourful(), format="PNG")
    assert read_address(tmp_path, tmp_path / "sub" / "page.html", address, base) == data


def test_an_image_is_found_by_the_address_of_its_file(tmp_path: pathlib.Path) -> None:
    data = save(tmp_path / "a b.png", colourful())
    for start in ("file://", "file://localhost", "file:"):
        address = start + urllib.parse.quote(str(tmp_path / "a b.png"))
        assert read_address(tmp_path, tmp_path / "page.html", address) == data


@pytest.mark.parametrize(
    "address, reason",
    [
        ("", "no address"),
        ("https://example.com/a.png", "on another machine"),
        ("//example.com/a.png", "on another machine"),
        ("\\\\server\\a.png", "on another machine"),
        ("blob:https://example.com/1", "address of no file"),
        ("javascript:void(0)", "address of no file"),
        ("C:\\a.png", "missing"),
        ("gone.png", "missing"),
        ("../secret.png", "outside the folder"),
        ("..%2Fsecret.png", "outside the folder"),
        ("file:///etc/passwd", "outside the folder"),
        ("data:image/png", "data address that cannot be decoded"),
        ("data:image/png;base64,***", "data address that cannot be decoded"),
    ],
)
def test_why_an_image_is_not_read(address: str, reason: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "site").mkdir()
    save(tmp_path / "secret.png", colourful())
    with pytest.raises(UnusableImage, match=f"^{reason}$"):
        read_address(tmp_path / "site", tmp_path / "site" / "page.html", address)


def test_images_within_the_page_are_read(tmp_path: pathlib.Path) -> None:
    data = save(tmp_path / "a.png", colourful())
    coded = base64.b64encode(data).decode()
    for address in (
        f"data:image/png;base64,{coded}",
        f"data:;charset=x;BASE64,{coded.rstrip('=')}",
        f"DATA:image/png;base64,\n {coded[:40]}\n {coded[40:]}",
        f"data:image/png,{urllib.parse.quote(data)}",
        f"data:image/png;base64,{urllib.parse.quote(coded, safe='')}",
    ):
        assert read_address(tmp_path, tmp_path / "page.html", address) == data


def test_places_are_tried_until_one_is_an_image(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "site" / "a.png", colourful())
    save(tmp_path / "site" / "spacer.gif", np.zeros((1, 1, 3), np.uint8))
    (tmp_path / "site" / "torn.png").write_bytes(b"\x89PNG")
    (tmp_path / "site" / "page.html").write_text("""text
        <img src="spacer.gif" data-src="a.png"><img src="a.png" data-src="http://example.com/a.png">
        <img srcset="torn.png 2x, gone.png 1x" src="a.png">
        <picture><source srcset="gone.avif"><source srcset="a.png 1x"><img src="gone.png"></picture>
        <img src="spacer.gif" data-original="gone.png">
        <img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" data-lazy-src="a.png">""")
    source = HtmlPages((str(tmp_path / "site"),), ALL_TRAIN)
    records = accounted(tmp_path / "pages", source, {}, {"missing": 1})
    assert len(records["page.html"]["images"]) == 5


def test_every_page_and_image_is_used_or_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page for each fault; the key says what becomes of it and of its images."""
    monkeypatch.setattr(html_pages, "MAX_PAGE", 1 << 20)
    root = tmp_path / "site"
    save(root / "a.png", colourful())
    save(root / "small.png", colourful(20, 20))
    save(root / "grey.png", np.full((80, 80, 3), 9, np.uint8))
    save(tmp_path / "secret.png", colourful())
    (root / "huge.png").write_bytes(huge_png(60_000))
    (root / "torn.png").write_bytes((root / "a.png").read_bytes()[:-300])
    os.symlink("../secret.png", root / "link.png")
    os.symlink("../site", tmp_path / "again")  # Of no consequence: it lies outside.
    os.symlink("../far", root / "linked")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "never.html").write_text("never seen<img src=a.png>")
    os.symlink("../far/never.html", root / "never.html")
    os.symlink("gone.html", root / "broken.html")
    shown, latin = '<img src="a.png">', "“né”"
    pages: dict[str, tuple[bytes, str | None]] = {
        "plain": (f"one{shown}two".encode(), None),
        "latin": (b"<meta charset=iso-8859-1>" + (latin + shown).encode("cp1252"), None),
        "japanese": (
            "<meta charset=shift_jis>日本語".encode("cp932") + b"\xff" + shown.encode(),
            None,
        ),
        "utf16": (f"text{shown}".encode("utf-16"), None),
        "deep": (b"<b>" * 5_000 + f"deep{shown}".encode(), None),
        "within": (f"text{shown}<img src=data:,AA>".encode(), None),
        "climb": (f"text{shown}<img src=..\\secret.png>".encode(), None),
        "linked": (f"text{shown}<img src=link.png>".encode(), None),
        "web": (f"text{shown}<img src=http://example.com/x.png>".encode(), None),
        "hidden": (f"text{shown}<p hidden>no{shown}</p><nav>no{shown}</nav>".encode(), None),
        "kinds": (
            f"x{shown}<img src=small.png><img src=grey.png><img src=huge.png>".encode(),
            None,
        ),
        "torn": (f"x{shown}<img src=torn.png><img src=gone.png><img>".encode(), None),
        "korean": (f"<meta charset=iso-2022-kr>{shown}".encode(), html_pages.NOT_DECODED),
        "empty": (b" \n", html_pages.UNREADABLE_PAGE),
        "none": (b"", html_pages.UNREADABLE_PAGE),
        "large": (shown.encode() + b"x" * (1 << 20), html_pages.TOO_LARGE),
        "pit": (b"<i>" * 70_000 + b"</b>" * 70_000 + shown.encode(), html_pages.TOO_DEEP),
        "mute": (shown.encode(), "page without text"),
        "bare": (b"text alone", "page without an image that is fit"),
        "lost": (b"text <img src=gone.png>", "page without an image that is fit"),
    }
    for name, (data, _) in pages.items():
        (root / f"{name}.html").write_bytes(data)
    dropped = {files.LINKED: 1, files.LINKED_FOLDER: 1, files.MISSING: 1}
    for _, reason in pages.values():
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
    images = {
        "unreadable": 2,
        "outside the folder": 1,
        files.LINKED: 1,
        "on another machine": 1,
        "hidden": 1,
        "outside the text": 1,
        "smaller than 64 pixels": 1,
        "single colour": 1,
        "too many pixels": 1,
        "missing": 2,
        "no address": 1,
        "on a page without text": 1,
    }
    records = accounted(tmp_path / "pages", HtmlPages((str(root),), ALL_TRAIN), dropped, images)
    assert set(records) == {f"{name}.html" for name, (_, reason) in pages.items() if not reason}
    said = {name: " ".join(strings(record["texts"])).strip() for name, record in records.items()}
    assert said["plain.html"] == "one two" and said["latin.html"] == latin
    assert said["japanese.html"].startswith("日本語") and said["deep.html"] == "deep"
    assert said["hidden.html"] == said["utf16.html"] == "text"


def test_a_page_holds_only_so_many_images(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(save(tmp_path / "site" / "a.png", colourful()))
    (tmp_path / "site" / "page.html").write_text("text" + "<img src=a.png>" * 5)
    source = HtmlPages((str(tmp_path / "site"),), ALL_TRAIN, ImageRules())
    monkeypatch.setattr(interleaved, "MAX_IMAGES", 3)
    records = accounted(tmp_path / "few", source, {}, {interleaved.BEYOND: 2})
    assert len(records["page.html"]["images"]) == 3
    monkeypatch.setattr(interleaved, "MAX_BYTES", 2 * size)
    records = accounted(tmp_path / "small", source, {}, {interleaved.BEYOND: 3})
    assert len(records["page.html"]["images"]) == 2
