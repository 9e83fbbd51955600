"""What the storage cannot read for a moment while a dataset is built is read again: it is no
damage of the source, and a build that lost it would keep that loss for ever.
"""

import builtins
import errno
import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from data_pipelines.build.html_pages import HtmlPages
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.images import ANY_IMAGE
from data_pipelines.build.plain_text import PlainText
from data_pipelines.build.source import DroppedRecord, Source, SplitRecord
from data_pipelines.build.video_folder import VideoFolder
from data_pipelines.build.webdataset import WebDataset
from flamingo_jax import storage
from flamingo_jax.errors import StorageError
from tests.data_pipelines.raw import ALL_TRAIN, colourful, film, lines, save
from tests.data_pipelines.test_tars import image, packed


def text(folder: pathlib.Path) -> Source:
    (folder / "a.txt").write_text("words")
    return PlainText((str(folder),), ALL_TRAIN)


def images(folder: pathlib.Path) -> Source:
    save(folder / "a.png", colourful())
    lines(folder / "captions.jsonl", {"image": "a.png", "caption": "a"})
    return ImageFolder((str(folder),), ALL_TRAIN)


def pages(folder: pathlib.Path) -> Source:
    save(folder / "a.png", colourful())
    (folder / "a.html").write_text('one <img src="a.png"> two')
    return HtmlPages((str(folder),), ALL_TRAIN, ANY_IMAGE)


def videos(folder: pathlib.Path) -> Source:
    film(folder / "a.mp4", 2)
    lines(folder / "captions.jsonl", {"video": "a.mp4", "caption": "a"})
    return VideoFolder((str(folder),), ALL_TRAIN)


def tar(folder: pathlib.Path) -> Source:
    (folder / "a.tar").write_bytes(packed([("a.png", image(50)), ("a.txt", b"a")]))
    return WebDataset((str(folder),), ALL_TRAIN)


SOURCES = {text: "a.txt", images: "a.png", pages: "a.html", videos: "a.mp4", tar: "a.tar"}


class Failing(io.FileIO):
    """A file whose reads fail with an error as long as `fails` says so."""

    fails: Callable[[], bool]
    number: int

    def readinto(self, buffer: Any) -> int:
        if self.fails():
            raise OSError(self.number, os.strerror(self.number))
        return super().readinto(buffer)

    def readall(self) -> bytes:
        if self.fails():
            raise OSError(self.number, os.strerror(self.number))
        return super().readall()


def break_storage(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int
) -> list[float]:
    """Reads of the files of that name fail so many times; returns the seconds that are waited."""
    waited: list[float] = []
    left = [times]
    whole = builtins.open

    def fails() -> bool:
        left[0] -= 1
        return left[0] >= 0

    def broken(path: Any, mode: str = "r", *options: Any, **named: Any) -> Any:
        if mode != "rb" or os.path.basename(path) != name:
            return whole(path, mode, *options, **named)
        file = Failing(path)
        file.fails, file.number = fails, number
        return io.BufferedReader(file)

    monkeypatch.setattr(builtins, "open", broken)
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_source_that_fails_for_a_moment_is_read_again(
    make: Callable[[pathlib.Path], Source],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make(tmp_path)
    whole = [source.convert(entry) for entry in source.entries()]
    assert [type(one) for (one,) in whole] == [SplitRecord]
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE):
        with monkeypatch.context() as patch:
            waited = break_storage(patch, SOURCES[make], number, 2)
            assert [source.convert(entry) for entry in source.entries()] == whole
            assert waited == list(storage.WAITS[:2])


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_source_that_fails_for_long_ends_the_build(
    make: Callable[[pathlib.Path], Source],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make(tmp_path)
    break_storage(monkeypatch, SOURCES[make], errno.EIO, 1_000)
    with pytest.raises(StorageError, match=f"{SOURCES[make]} could not be read 5 times"):
        [source.convert(entry) for entry in source.entries()]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_what_nobody_may_read_is_counted_at_once(
    make: Callable[[pathlib.Path], Source],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make(tmp_path)
    waited = break_storage(monkeypatch, SOURCES[make], errno.EACCES, 1_000)
    ((dropped,),) = [source.convert(entry) for entry in source.entries()]
    assert isinstance(dropped, DroppedRecord) and dropped.reason == "unreadable" and not waited


def test_a_folder_that_cannot_be_listed_for_a_moment_is_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, scan, left = text(tmp_path), os.scandir, [2]

    def scandir(folder: str) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "stale")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)
    assert [str(entry[-1]) for entry in source.entries()] == ["a.txt"]
