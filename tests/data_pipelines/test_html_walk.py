"""Text and images of a page in the order of the document, as a reader sees them."""

import random
import time

import bs4
import pytest

from data_pipelines.build.html_walk import SKIPPED, PageImage, TooDeep, walk
from data_pipelines.build.interleaved import PAGES_RULES, joined, make_page
from data_pipelines.build.source import DroppedRecord


def page_text(page: str) -> str:
    return joined(item for item in walk(page.encode()).items if isinstance(item, str))


def places(page: str) -> list[tuple[str, ...]]:
    return [item.places for item in walk(page.encode()).items if isinstance(item, PageImage)]


def test_broken_pages_are_read_as_far_as_they_go() -> None:
    assert page_text("<p>one <b>two <i>three</p><div>four") == "one two three\nfour"
    assert page_text("<style>x</style>tail<footer>f</footer> after") == "tail after"
    assert page_text("<p>a</p></body></html><p>after") == "a\nafter"
    assert page_text("<p>a\0b") == "a\ufffdb"


def test_a_page_within_a_form_is_read_without_its_fields() -> None:
    fields = "<button>b</button><select><option>c</select><textarea>d</textarea>"
    page = f"<form>one<p>two{fields}</form>three"
    assert page_text(page) == "one\ntwo\nthree"


def test_a_body_that_does_not_say_where_it_begins_is_read() -> None:
    assert page_text("<title>t</title><main>one<p>two</main>three") == "one\ntwo\nthree"
    assert page_text("<meta charset=utf-8><base href=x><section>one</section>two") == "one\ntwo"


def test_lines_of_programs_and_poems_are_kept() -> None:
    page = "<p>Run  it:<pre>\ndef f():\n    <b>return</b>  1  \n\n\nf()<br>f()\n</pre> and\n go on"
    assert page_text(page) == "Run it:\ndef f():\n    return  1\n\n\nf()\nf()\nand go on"
    assert page_text("<pre><div>a</div><div>  b</div></pre><xmp>c\n d</xmp>") == "a\n  b\nc\n d"


HIDDEN = [
    "<p hidden>no</p>",
    '<div hidden="hidden"><b>no</b><p>no</div>',
    '<span style="color: red; DISPLAY : none">no</span>',
    '<td style="visibility:hidden">no</td>',
    "<dialog>no</dialog>",
    '<p style="display:none">no<p>',
    "<datalist><option>no</datalist>",
]
SHOWN = [
    '<p style="display:block">yes</p>',
    '<p data-hidden style="--display:none">yes</p>',
    '<p aria-hidden="true">yes</p>',
    '<p hidden="until-found">yes</p>',
    "<dialog open>yes</dialog>",
    "<details><summary>yes</summary></details>",
]


@pytest.mark.parametrize("part", HIDDEN + SHOWN)
def test_text_that_nobody_sees_is_not_read(part: str) -> None:
    words = page_text(f"<div>one {part} two").split()
    assert words == (["one", "two"] if part in HIDDEN else ["one", "yes", "two"])


def test_what_is_read_is_what_a_tree_holds_outside_the_unread() -> None:
    """Against a tree of Beautiful Soup's, on pages drawn by chance."""
    tags = [
        "div",
        "p",
        "b",
        "li",
        "ul",
        "nav",
        "script",
        "td",
        "table",
        "span",
        "footer",
        "form",
    ]
    for seed in range(300):
        drawn = random.Random(seed)
        page = ""
        for number in range(40):
            tag = drawn.choice(tags)
            hidden = drawn.choice(["", "", "", " hidden", " style='display:none'"])
            page += drawn.choice([f"<{tag}{hidden}>", f"</{tag}>", f" w{number} "])
        soup = bs4.BeautifulSoup(page, "lxml")
        for part in soup.find_all(True):
            if part.decomposed:
                continue
            if part.name in SKIPPED or part.has_attr("hidden") or part.has_attr("style"):
                part.decompose()
        assert page_text(page or " x").split() == soup.get_text(" ").split(), page


def test_places_of_an_image_are_those_of_late_loaders_then_a_browser_s_choice() -> None:
    page = """<picture><source srcset="a.webp 1x, a2.webp 2x" type="image/webp">
        <source data-srcset="late.webp 1x"><img src="a.png" srcset="s.png 300w, l.png 1024w">
        </picture>
        <img src="b.png">"""
    first = ("a2.webp", "a.webp", "late.webp", "l.png", "s.png", "a.png")
    assert places(page) == [first, ("b.png",)]
    late = "data-src data-lazy-src data-original data-lazy data-actualsrc".split()
    for name in late:
        page = f'<img src="data:image/gif;base64,AA" {name}=" real.png ">'
        assert places(page) == [("real.png", "data:image/gif;base64,AA")]
    assert places('<img data-srcset="x.png 2w,y.png 9w" src="z.png">') == [
        ("y.png", "x.png", "z.png")
    ]
    assert places("<img><image src=a.png><amp-img src=b.png>") == [(), ("a.png",), ("b.png",)]
    assert places("<picture><source srcset=only.png></picture>x") == [("only.png",)]


@pytest.mark.parametrize(
    "srcset, expected",
    [
        ("a.png", ["a.png"]),
        ("a.png 1x, b.png 2x", ["b.png", "a.png"]),
        ("a.png 1x,b.png 1.5x", ["b.png", "a.png"]),
        (" , a.png 320w , b.png 64w", ["a.png", "b.png"]),
        (
            "a,b.png 2x, data:image/png;base64,AAAA 3x",
            ["data:image/png;base64,AAAA", "a,b.png"],
        ),
        ("a.png calc(1, 2), b.png 2x", ["b.png", "a.png"]),
        ("a.png nanw, b.png 1e999w, c.png 5w", ["c.png", "a.png", "b.png"]),
        ("a.png,, b.png", ["a.png", "b.png"]),
        ("", []),
    ],
)
def test_a_srcset_gives_the_largest_first(srcset: str, expected: list[str]) -> None:
    assert places(f'<img srcset="{srcset}">') == [tuple(expected)]


LATE = '<img src="spacer.gif" data-src="a.png">'


@pytest.mark.parametrize(
    "page, expected",
    [
        (f'{LATE} <noscript><img src="a.png"></noscript>', [("a.png", "spacer.gif")]),
        (f'<noscript><img src="a.png"></noscript>{LATE}', [("a.png", "spacer.gif")]),
        (
            '<img src="spacer.gif" class="late"><noscript><p>x<img src="a.png"></noscript>',
            [("spacer.gif", "a.png")],
        ),
        (
            f'{LATE} text <noscript><img src="b.png"></noscript>',
            [("a.png", "spacer.gif"), ("b.png",)],
        ),
        ('<noscript><img src="a.png"></noscript>', [("a.png",)]),
        (
            (
                f'{LATE}<img data-src="b.png"><noscript><img src="a.png"><img'
                ' src="b.png"></noscript>'
            ),
            [("a.png", "spacer.gif"), ("b.png",)],
        ),
        ('<img src="a.png"><img src="a.png">', [("a.png",), ("a.png",)]),
        (
            f"{LATE * 2}<noscript>{'<img src=a.png>' * 2}</noscript>",
            [("a.png", "spacer.gif")] * 2,
        ),
        (
            '<picture><source srcset="s.png"><noscript><img src="a.png"></noscript></picture>',
            [("s.png", "a.png")],
        ),
    ],
)
def test_an_image_for_browsers_without_scripts_is_no_second_one(
    page: str, expected: list[tuple[str, ...]]
) -> None:
    assert places(page) == expected
    assert page_text("<noscript>Turn scripts on!<br></noscript>" + page) in ("", "text")


def test_images_that_are_not_shown_say_why() -> None:
    page = (
        "<nav><img src=a></nav><p hidden><img src=b></p><img src=c style='display:none'><img src=d>"
    )
    images = [item for item in walk(page.encode()).items if isinstance(item, PageImage)]
    assert [image.unread for image in images] == [
        "outside the text",
        "hidden",
        "hidden",
        "",
    ]


def test_pages_nested_without_end_are_read_whole() -> None:
    words = [f"w{number}" for number in range(30_000)]
    for tag in ("b", "div", "font"):
        page = "".join(f"<{tag}>{word} " for word in words)
        assert page_text(page).split() == words
    deep = "<div>" * 20_000 + "core" + "</div>" * 20_000 + "<p>end"
    assert page_text(deep) == "core\nend"


REPEATED = {
    "paragraphs": "<p>some words here</p>\n",
    "words": "word <b>bold</b> text ",
    "lines": "line<br>",
    "images": "<img src=a.png> <noscript><img src=b.png></noscript>",
    "nested": "<div><b>x ",
    "tables": "<table><tr><td>x",
    "programs": "<pre>x\n<div>y</div></pre>",
    "brackets": "< ",
}
ONCE = {
    "attributes": "<p {}>x".format(" ".join(f"a{number}=b" for number in range(100_000))),
    "srcset": "<img srcset='{}'>".format("a.png 1x, " * 100_000),
    "style": "<p style='{}'>x".format("display :" * 100_000),
}


@pytest.mark.parametrize("name", [*REPEATED, *ONCE])
def test_the_time_is_linear_in_the_page_s_bytes(name: str) -> None:
    part = REPEATED.get(name, "")
    page = ONCE[name] if name in ONCE else part * (300_000 // len(part))
    began = time.process_time()
    page_text(page)
    assert time.process_time() - began < 20  # The attributes alone took a tree 90 s.


def test_a_record_is_made_in_linear_time_too() -> None:
    began = time.process_time()
    pieces = ["some text that is long enough to be copied often "] * 200_000
    assert isinstance(make_page("a", "train", pieces, PAGES_RULES), DroppedRecord)
    assert time.process_time() - began < 10  # Each piece added to those before it: 15 minutes.


def test_nesting_that_would_take_minutes_is_refused() -> None:
    began = time.process_time()
    with pytest.raises(TooDeep):
        walk(b"<div>" * 300_000 + b"</b>" * 300_000)
    assert time.process_time() - began < 10
