"""The real command in a headless Chromium: type, upload, watch an answer, look at its tokens,
stop it, and make every mistake.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.build.synthetic_world import build_quickstart
from tests.playground.tiny import make_world_export
from tests.processes import one_device

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[playground]'")
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the browser needs selenium: pip install -e '.[playground-test]'"
)
CHROMIUM, DRIVER = pathlib.Path("/usr/bin/chromium"), pathlib.Path("/usr/bin/chromedriver")
pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(
        not (CHROMIUM.exists() and DRIVER.exists()),
        reason="there is no Chromium: apt-get install chromium chromium-driver",
    ),
]
ROOT = pathlib.Path(__file__).parents[2]
PATIENCE = 150
"""Seconds that a page may take, first compilations included."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the synthetic world's data and an export of random weights."""
    root = tmp_path_factory.mktemp("world")
    build_quickstart(root / "data", limit=12)
    make_world_export(root)
    return root


@pytest.fixture(scope="module")
def server(
    world: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen, pathlib.Path]]:
    """The command, running in an empty folder: its address, process and folder of temporary
    files.
    """
    cwd, temporary = (tmp_path_factory.mktemp(name) for name in ("empty", "temporary"))
    data = world / "data"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "launch.playground",
            f"--model={world}/export",
            f"--examples={data}/caption_one,{data}/vqa,{data}/motion",
            "--example_count=6",
            "--max_upload_megabytes=4",
            "--port=0",
        ],
        cwd=cwd,
        env=one_device() | {"PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "HOME": str(cwd)},
        stdout=subprocess.PIPE,
        stderr=(temporary / "stderr.txt").open("w"),
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.match(r"open (http://127\.0\.0\.1:\d+)", line)
        assert found, (temporary / "stderr.txt").read_text()
        yield found[1], process, temporary
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser(server: tuple[str, Any, Any]) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1360,1240"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    driver.set_script_timeout(PATIENCE)
    try:
        driver.get(server[0])
        wait(driver, lambda: find(driver, "#gallery [data-do=ask]"))
        yield driver
    finally:
        driver.quit()


def find(browser: Any, css: str) -> list[Any]:
    return browser.find_elements("css selector", css)


def wait(browser: Any, what: Callable[[], Any]) -> Any:
    """Waits until `what` is true, and returns it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    save(browser, "timeout")
    raise AssertionError(f"it did not happen; the page says {said(browser)!r}")


def click(browser: Any, css: str) -> None:
    """Clicks at once where it is, also on a page that is being drawn again."""
    browser.execute_script("document.querySelector(arguments[0]).click()", css)


def said(browser: Any) -> str:
    """The status line."""
    return browser.execute_script("return document.querySelector('#status').innerText.trim()")


def type_in(browser: Any, text: str, index: int = 0) -> None:
    browser.execute_script(
        "document.querySelectorAll('#editor textarea')[arguments[0]].value = arguments[1]",
        index,
        text,
    )


def upload(browser: Any, *files: pathlib.Path) -> None:
    find(browser, "#editor [data-files]")[0].send_keys("\n".join(map(str, files)))


def answer(browser: Any) -> list[str]:
    """Presses Answer, and returns the tokens' texts once they are all there."""
    click(browser, "#editor [data-do=answer]")
    wait(browser, lambda: find(browser, "#answer [data-done='0']") or " a second" in said(browser))
    wait(browser, lambda: find(browser, "#answer [data-do=token]"))
    return [token.text for token in find(browser, "#answer [data-do=token]")]


def save(browser: Any, name: str) -> None:
    """Saves a screenshot where one is wanted."""
    if folder := os.environ.get("PLAYGROUND_SCREENSHOTS"):
        browser.save_screenshot(f"{folder}/{name}.png")


def test_an_answer_arrives_and_its_tokens_show_what_they_looked_at(browser: Any) -> None:
    assert "playground" in browser.title
    save(browser, "start")
    click(browser, "#gallery [data-do=ask]")
    wait(browser, lambda: find(browser, "#editor .fj-part img"))
    click(browser, "#gallery [data-do=shots][data-index='2']")
    wait(browser, lambda: len(find(browser, "#editor .fj-shot")) == 2)
    tokens = answer(browser)
    assert len(tokens) > 1
    assert re.search(r"\d+ tokens in .* a second\), log-probability -?\d", said(browser))
    assert len(find(browser, "#answer .fj-token img")) == len(tokens)
    click(browser, "#answer [data-do=token][data-index='1']")
    wait(browser, lambda: find(browser, "#look [data-token='1']"))
    assert "log-probability" in said(browser)  # A click on a token leaves the status line.
    look = find(browser, "#look")[0].text
    assert "reads image 3 of 3 (phi)" in look and "brightest of" in look
    assert len(find(browser, "#look .fj-heat img")) == 2
    assert len(find(browser, "#look .fj-alternatives tr")) == 8
    assert find(browser, "#look .fj-visuals .fj-on figcaption")[0].text == "3: 100 %"
    before = find(browser, "#look .fj-heat img")[1].get_attribute("src")
    browser.execute_script(
        "const s = document.querySelector('#look [data-block]'); s.value = '2';"
        "s.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    wait(
        browser,
        lambda: browser.execute_script(
            "return document.querySelectorAll('#look .fj-heat img')[1].src != arguments[0]", before
        ),
    )
    save(browser, "image")


def test_a_clip_is_looked_at_frame_by_frame(browser: Any) -> None:
    click(browser, "#gallery figure:nth-child(13) [data-do=ask]")  # The first of motion.
    wait(browser, lambda: "frames" in find(browser, "#editor .fj-parts")[0].text)
    answer(browser)
    captions = [each.text for each in find(browser, "#look .fj-heat figcaption")]
    assert len(captions) == 8 and sum(int(re.findall(r"(\d+) %", c)[0]) for c in captions) > 90
    save(browser, "clip")


def test_an_uploaded_image_and_text_are_put_in_order(browser: Any, tmp_path: pathlib.Path) -> None:
    Image.fromarray(np.full((40, 60, 3), (200, 30, 30), np.uint8)).save(tmp_path / "red.png")
    frames = [Image.fromarray(np.full((32, 32, 3), 60 * n, np.uint8)) for n in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    click(browser, "#editor [data-do=clear]")
    wait(browser, lambda: not find(browser, "#editor .fj-part img"))
    type_in(browser, "Look:")
    upload(browser, tmp_path / "red.png", tmp_path / "a.gif")
    wait(browser, lambda: len(find(browser, "#editor .fj-part img")) == 2)
    click(browser, "#editor [data-do=text]")
    wait(browser, lambda: len(find(browser, "#editor textarea")) == 2)
    type_in(browser, "Output:", 1)
    click(browser, "#editor .fj-part:nth-child(2) [data-do=down]")  # The image below the clip.
    wait(browser, lambda: "clip" in find(browser, "#editor .fj-part")[1].text)
    kinds = [
        find(part, "img")[0].get_attribute("alt") if find(part, "img") else "text"
        for part in find(browser, "#editor .fj-part")
    ]
    assert kinds == ["text", "clip", "image", "text"]
    typed = [t.get_attribute("value") for t in find(browser, "#editor textarea")]
    assert typed == ["Look:", "Output:"]
    answer(browser)
    assert "reads image 2 of 2 (phi)" in find(browser, "#look")[0].text


def test_markup_in_a_text_stays_text(browser: Any) -> None:
    nasty = "<img src=x onerror='window.hacked=1'> ${window.hacked=1} {{value}} `</textarea>"
    click(browser, "#editor [data-do=clear]")
    wait(browser, lambda: len(find(browser, "#editor textarea")) == 1)
    type_in(browser, nasty)
    click(browser, "#editor [data-do=text]")
    wait(browser, lambda: len(find(browser, "#editor textarea")) == 2)
    assert find(browser, "#editor textarea")[0].get_attribute("value") == nasty
    answer(browser)
    assert browser.execute_script("return window.hacked") is None


def test_an_answer_is_stopped(browser: Any) -> None:
    _set_most(browser, 1000)
    click(browser, "#gallery [data-do=ask]")
    wait(browser, lambda: find(browser, "#editor .fj-part img"))
    click(browser, "#editor [data-do=answer]")
    wait(browser, lambda: find(browser, "#answer [data-done='0'] .fj-token"))
    click(browser, "#editor [data-do=stop]")
    wait(browser, lambda: "stopped by you" in said(browser))
    assert 0 < len(find(browser, "#answer .fj-token")) < 1000
    click(browser, "#editor [data-do=stop]")
    wait(browser, lambda: "nothing is being written" in said(browser))


def _large_png(folder: pathlib.Path) -> pathlib.Path:
    Image.new("1", (12_500, 8_000)).save(folder / "large.png")
    return folder / "large.png"


def _text_png(folder: pathlib.Path) -> pathlib.Path:
    (folder / "text.png").write_text("no image at all\n")
    return folder / "text.png"


def _large_file(folder: pathlib.Path) -> pathlib.Path:
    (folder / "film.mp4").write_bytes(bytes(5 << 20))
    return folder / "film.mp4"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_large_png, "large.png: 12500 x 8000 pixels are more than 64000000"),
        (_text_png, "text.png is neither an image nor a clip that can be read"),
        (_large_file, "film.mp4 was not taken, since files have at most 4 MB"),
    ],
)
def test_a_bad_file_is_one_sentence_and_the_server_goes_on(
    browser: Any, tmp_path: pathlib.Path, make: Any, sentence: str, server: Any
) -> None:
    upload(browser, make(tmp_path))
    wait(browser, lambda: sentence in said(browser))
    assert "\n" not in said(browser) and find(browser, "#status [role=alert]")
    save(browser, make.__name__.strip("_"))
    assert not [f for f in server[2].rglob("*") if f.is_file() and f.suffix in (".png", ".mp4")]
    assert _goes_on(browser)


def test_a_bad_prompt_is_one_sentence_and_the_server_goes_on(browser: Any) -> None:
    for text, sentence in (
        ("", "the prompt is empty"),
        (" a red circle" * 7000, "tokens, and 16 are to follow, but 16384 are the most in all"),
        ("x" * 100_001, "a text has 100,001 characters, but 100,000 are the most"),
    ):
        _set_most(browser, 16)
        click(browser, "#editor [data-do=clear]")
        wait(browser, lambda: not find(browser, "#editor .fj-part img"))
        type_in(browser, text)
        click(browser, "#editor [data-do=answer]")
        wait(browser, lambda sentence=sentence: sentence in said(browser))
        type_in(browser, "")
        assert _goes_on(browser)


def _set_most(browser: Any, count: int) -> None:
    """Sets the most tokens of an answer."""
    if not find(browser, "#most input"):
        click(browser, "#decoding button")
        wait(browser, lambda: find(browser, "#most input"))
    browser.execute_script(
        "const n = document.querySelector('#most input[type=number]'); n.value = arguments[0];"
        "n.dispatchEvent(new Event('input', {bubbles: true}));"
        "n.dispatchEvent(new Event('change', {bubbles: true}))",
        str(count),
    )


def _goes_on(browser: Any) -> list[str]:
    _set_most(browser, 4)
    click(browser, "#gallery [data-do=ask]")
    wait(browser, lambda: find(browser, "#editor .fj-part img") and not said(browser))
    click(browser, "#editor [data-do=answer]")
    wait(browser, lambda: " a second" in said(browser))
    return find(browser, "#answer .fj-token")


def test_no_other_machine_was_asked(browser: Any, server: tuple[str, Any, Any]) -> None:
    asked = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert len(asked) > 10
    assert not [url for url in asked if not url.startswith((server[0], "data:", "blob:"))]


def test_it_ends_by_sigterm_and_leaves_nothing(
    browser: Any, server: tuple[str, Any, pathlib.Path]
) -> None:
    _, process, temporary = server
    (folder,) = temporary.glob("playground_*")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not folder.exists()
