"""One made set of all that goes wrong with other people's shards and videos, built once a
source: what is read is used or dropped, and the reasons are those of a key that is written
here.
"""

import collections
import dataclasses
import gzip
import io
import json
import pathlib
import tarfile
from collections.abc import Callable

import av
import numpy as np
import pytest

from data_pipelines.build.questions_folder import QuestionsFolder
from data_pipelines.build.source import Source
from data_pipelines.build.video_folder import VideoFolder
from data_pipelines.build.webdataset import WebDataset
from data_pipelines.build.writer import write_dataset
from tests.data_pipelines.raw import ALL_TRAIN, colourful, huge_png, lines, read, save
from tests.data_pipelines.test_damage import SOURCES
from tests.processing.films import levels, quarters, write, write_two


@dataclasses.dataclass
class Key:
    """What a build must say: ids of the records used, and how many of what for which reason."""

    used: set[str] = dataclasses.field(default_factory=set)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    parts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Shard:
    """A shard written member by member, the key beside it. name: of the shard, without `.tar`."""

    def __init__(self, name: str, key: Key):
        self.name, self.key = name, key
        self._members: list[tuple[tarfile.TarInfo, bytes]] = []

    def add(self, name: str, data: bytes = b"", **fields: object) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        self._members.append((info, data))

    def images(self, *names: str) -> None:
        for name in names:
            self.add(name, IMAGE)

    def texts(self, *names: str) -> None:
        for name in names:
            self.add(name, b"a text")

    def use(self, *keys: str) -> None:
        self.key.used |= {f"{self.name}/{key}" for key in keys}

    def drop(self, **reasons: int) -> None:
        self.key.dropped.update(
            {reason.replace("_", " "): count for reason, count in reasons.items()}
        )

    def bytes(self) -> bytes:
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for info, content in self._members:
                tar.addfile(info, io.BytesIO(content))
        return data.getvalue()


def png() -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(colourful(40, 50)).save(data, "PNG")
    return data.getvalue()


IMAGE = png()
Make = Callable[[pathlib.Path], tuple[Source, dict[str, int]]]


def fill_names(shard: Shard) -> None:
    """Names with dots, endings of several parts, keys that repeat or stand apart, hidden files."""
    for stem in ("a.1", "a.2", "v1.0-x", "d.e/f.g"):
        shard.images(f"{stem}.png")
        shard.texts(f"{stem}.txt")
        shard.use(stem)
    for _ in range(2):
        shard.images("twice.png")
        shard.texts("twice.txt")
    shard.use("twice", "twice#2")
    shard.images("2.seg.png", "2.left.png", "2.png")
    shard.texts("2.cls.txt", "2.txt")
    shard.use("2")
    shard.key.parts["another image of the same sample"] += 1
    shard.images("mask.seg.png")
    shard.texts("mask.txt")
    shard.drop(no_image=1)
    shard.images("apart.1.png", "apart.2.png", "far.png", "._a.png", "__MACOSX/._far.png")
    shard.add(".DS_Store", b"\0" * 100)
    shard.texts("far.txt", "apart.2.txt", "apart.1.txt", "._far.txt")
    shard.use("apart.1", "apart.2", "far")
    shard.images("x.png", "y.png", "x.png")
    shard.texts("y.txt", "x.txt")
    shard.key.dropped["sample of a key that repeats, apart from its other members"] += 3
    shard.use("y")


def fill_damage(shard: Shard) -> None:
    shard.texts("alone.txt")
    shard.drop(no_image=1)
    shard.images("silent.png")
    shard.add("blank.png", IMAGE)
    shard.add("blank.txt", b" \n")
    shard.drop(no_caption=2)
    for name, data in (
        ("cut", IMAGE[:-200]),
        ("html", b"<html>"),
        ("bomb", huge_png(60_000)),
    ):
        shard.add(f"{name}.png", data)
        shard.texts(f"{name}.txt")
    shard.drop(unreadable=2, too_many_pixels=1)
    shard.images("latin.png", "json.png")
    shard.add("latin.txt", b"caf\xe9")
    shard.add("json.json", b'{"caption": ')
    shard.key.dropped["text that is not UTF-8"] += 1
    shard.key.dropped["caption file that is not JSON with a caption"] += 1
    for name in ("../out.png", "/out.png"):
        shard.add(name, IMAGE)
    shard.drop(member_whose_name_leads_out_of_the_shard=2)
    shard.add("link.png", type=tarfile.SYMTYPE, linkname="silent.png")
    shard.drop(member_that_is_a_link_or_a_device=1)
    shard.add("holes.png", bytes(1_024), type=tarfile.GNUTYPE_SPARSE)
    shard.drop(member_that_is_stored_with_holes=1)
    shard.images("last.png")
    shard.texts("last.txt")
    shard.use("last")


def test_no_sample_of_a_shard_goes_without_a_count(tmp_path: pathlib.Path) -> None:
    key, raw = Key(), tmp_path / "raw"
    raw.mkdir()
    for name, fill in (("names", fill_names), ("damage", fill_damage)):
        for packed in (False, True):
            shard = Shard(f"{name}.tar.gz" if packed else name, key)
            fill(shard)
            data = shard.bytes()
            file = f"{name}.tar.gz" if packed else f"{name}.tar"
            (raw / file).write_bytes(gzip.compress(data) if packed else data)
    (raw / "._names.tar").write_bytes(b"\0\5\x16\7")
    (raw / "garbage.tar").write_bytes(b"no tar at all" * 100)
    (raw / "empty.tar").write_bytes(bytes(10_240))
    (raw / "later.tar").write_bytes(b"\x04\x22\x4d\x18" + bytes(1_000))
    whole = (raw / "damage.tar").read_bytes()
    (raw / "torn.tar").write_bytes(whole[: 512 + 100])
    key.dropped.update(
        {
            "shard that is no tar file": 1,
            "shard without a file in it": 1,
            "shard compressed with lz4, which is not read": 1,
        }
    )
    key.dropped["no image"] += 1  # Its only member is a text, and whole.
    check(tmp_path, WebDataset((str(raw),), ALL_TRAIN), key)


def film(path: pathlib.Path, **options: object) -> None:
    write(path, [20] * 10 + [60] * 10 + [100] * 10, rate=10, **{"codec": "mpeg4", **options})


def hurt(path: pathlib.Path, number: int) -> None:
    """One packet becomes zeros."""
    with av.open(str(path)) as container:
        packet = next(p for i, p in enumerate(container.demux(video=0)) if i == number)
        start, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[start + 8 : start + 8 + size] = bytes(size)
    path.write_bytes(bytes(data))


def fill_films(raw: pathlib.Path, key: Key) -> list[str]:
    """The names that the caption file shall have."""
    film(raw / "a.mp4")
    film(raw / "bare.m4v", form="m4v")
    film(raw / "jump.mkv", stamp=lambda number: number + 5_000 * (number >= 15))
    write_two(raw / "cover.mp4", quarters(), [20] * 10 + [60] * 10 + [100] * 10, cover=True)
    film(raw / "twice.ts", form="mpegts")
    (raw / "twice.ts").write_bytes(2 * (raw / "twice.ts").read_bytes())
    film(raw / "one.avi", codec="mjpeg")
    hurt(raw / "one.avi", 12)
    key.parts["damaged frame of a video"] += 1
    film(raw / "torn.mkv")
    torn = (raw / "torn.mkv").read_bytes()
    (raw / "torn.mkv").write_bytes(torn[: len(torn) // 2])
    key.parts["rest of a video that breaks off"] += 1
    used = ["a.mp4", "bare.m4v", "jump.mkv", "cover.mp4", "twice.ts", "one.avi", "torn.mkv"]
    key.used |= set(used)
    outside = (raw / "a.mp4").resolve().as_uri()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{outside}\n#EXT-X-ENDLIST\n"
    (raw / "list.m3u8").write_text(playlist)
    (raw / "list.ffconcat").write_text("ffconcat version 1.0\nfile a.mp4\n")
    save(raw / "still.png", colourful())
    foreign = ["list.m3u8", "list.ffconcat", "still.png"]
    key.dropped["not a video, or one that names other files"] += len(foreign)
    whole = (raw / "a.mp4").read_bytes()
    (raw / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (raw / "none.mp4").write_bytes(b"")
    (raw / "html.webm").write_bytes(b"<html>")
    key.dropped["unreadable"] += 3
    for name in ("._a.mp4", "sub/._b.mp4", ".DS_Store"):
        (raw / name).parent.mkdir(exist_ok=True)
        (raw / name).write_bytes(b"\0\5\x16\7")
    return [*used, *foreign, "half.mp4", "none.mp4", "html.webm"]


def test_no_video_goes_without_a_count(tmp_path: pathlib.Path) -> None:
    key, raw = Key(), tmp_path / "raw"
    named = fill_films(raw, key)
    film(raw / "alone.mp4")
    film(tmp_path / "secret.mp4")
    told = [{"video": name, "caption": "brighter"} for name in named]
    told += [{"video": "gone.mp4", "caption": "x"}, {"video": "../secret.mp4", "caption": "x"}]
    lines(raw / "videos.jsonl", *told, '{"video": "a.mp4"', {"video": "a.mp4", "caption": "again"})
    (raw / "._videos.jsonl").write_bytes(b"\0\5\x16\7")
    key.dropped.update({"no caption": 1, "missing": 1, "outside the folder": 1})
    key.dropped["caption line that is not JSON with a name and captions"] += 1
    records = check(tmp_path, VideoFolder((str(raw),), ALL_TRAIN, short_side=32), key)
    for name, record in records.items():
        shown = levels(np.asarray(frame, np.uint8) for frame in record["frames"])
        seconds = 2 * [20, 60, 100] if name == "twice.ts" else [20, 60, 100]
        np.testing.assert_allclose(shown, seconds[: len(shown)], atol=8)
        assert len(shown) == len(seconds) or name == "torn.mkv"


def test_no_question_about_a_video_goes_without_a_count(tmp_path: pathlib.Path) -> None:
    """What a video lost is counted once, however many ask about it."""
    key, raw = Key(), tmp_path / "raw"
    named = fill_films(raw, key)
    asked = {"question": "what?", "answer": "grey"}
    lines(raw / "qa.jsonl", *({"video": name, **asked} for name in [*named, *named]))
    key.dropped.update(dict(key.dropped))
    key.used = {f"{name}#{number}" for name in key.used for number in (0, 1)}
    check(tmp_path, QuestionsFolder((str(raw),), ALL_TRAIN, video_short_side=32), key)


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_hidden_files_are_data_nowhere(make: Make, tmp_path: pathlib.Path) -> None:
    """What macOS leaves beside every file, and the folder that its archives have."""
    source, dropped = make(tmp_path / "raw")
    for file in [path for path in (tmp_path / "raw").rglob("*") if path.is_file()]:
        for twin in (file.with_name(f"._{file.name}"), file.parent / "__MACOSX" / file.name):
            twin.parent.mkdir(exist_ok=True)
            twin.write_bytes(b"\0\5\x16\7" + b"\0" * 100)
        (file.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    statistics, _ = write_dataset(tmp_path / "out", source)
    assert statistics["dropped"] == dropped


def check(tmp_path: pathlib.Path, source: Source, key: Key) -> dict[str, dict]:
    statistics, _ = write_dataset(tmp_path / "out", source)
    records = read(tmp_path / "out")
    assert set(records) == key.used and statistics["used"] == len(key.used)
    assert statistics["dropped"] == dict(key.dropped)
    assert statistics["images"]["dropped"] == dict(key.parts)
    assert statistics["records_read"] == len(key.used) + key.dropped.total()
    stored = json.loads((tmp_path / "out" / "1.0.0" / "statistics.json").read_text())
    assert stored["dropped"] == statistics["dropped"]
    return records
