"""Samples out of tar shards: which members belong together, and that none goes without a count."""

import bz2
import collections
import gzip
import io
import itertools
import lzma
import pathlib
import random
import re
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from PIL import Image

from data_pipelines.build import byte_ranges, tars
from data_pipelines.build.input_files import by_address
from data_pipelines.build.source import SplitFractions
from data_pipelines.build.tar_samples import REPEATED, TarSample, samples
from data_pipelines.build.webdataset import NO_CAPTION, NO_IMAGE, OTHER_IMAGE, WebDataset
from data_pipelines.build.writer import write_dataset
from flamingo_jax.errors import UserError
from tests.data_pipelines.raw import ALL_TRAIN, read, strings

Members = Iterable[tuple[str, bytes]]


def image(level: int) -> bytes:
    """Told from others by its level."""
    pixels = np.full((40, 40, 3), level, np.uint8)
    pixels[:20] += 10
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def packed(members: Members) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def named(names: Iterable[str]) -> list[tuple[str, bytes]]:
    """Members of these names: images of levels 10, 20, ... in their order, texts that say
    their own name and which time it comes.
    """
    levels, times = itertools.count(10, 10), collections.Counter[str]()
    made = []
    for name in names:
        times[name] += 1
        text = f"{name} {times[name]}".encode()
        is_image = name.rsplit(".", 1)[-1].lower() in ("jpg", "jpeg", "png")
        made.append((name, image(next(levels)) if is_image else text))
    return made


def found(shard: pathlib.Path) -> tuple[dict[str, tuple[int, list[str]]], dict, dict]:
    """What a build of a shard gives: (level, captions) by id in the shard, what is dropped, and
    the images that are.
    """
    output = shard.parent / f"out_{shard.name.replace('.', '_')}"
    statistics, _ = write_dataset(output, WebDataset((str(shard),), ALL_TRAIN))
    records = {
        name.split("/", 1)[1]: (
            round(float(record["image"].mean())) - 5,
            strings(record["captions"]),
        )
        for name, record in read(output).items()
    }
    dropped = statistics["dropped"]
    assert statistics["records_read"] == statistics["used"] + sum(dropped.values())
    assert statistics["used"] == len(records)
    return records, dropped, statistics["images"]["dropped"]


def says(name: str, time: int = 1) -> list[str]:
    return [f"{name} {time}"]


CASES: dict[str, tuple[str, dict, dict, dict]] = {
    "dots in names": (
        "a.1.jpg a.1.txt a.2.jpg a.2.txt a.3.0.jpg a.3.0.txt a.x y.jpg a.x y.txt",
        {
            "a.1": (10, says("a.1.txt")),
            "a.2": (20, says("a.2.txt")),
            "a.3.0": (30, says("a.3.0.txt")),
            "a.x y": (40, says("a.x y.txt")),
        },
        {},
        {},
    ),
    "dots in names, by kind": (
        "d/v1.0-1.jpg d/v1.0-2.jpg d/v1.0-1.txt d/v1.0-2.txt",
        {"d/v1.0-1": (10, says("d/v1.0-1.txt")), "d/v1.0-2": (20, says("d/v1.0-2.txt"))},
        {},
        {},
    ),
    "dots in names, some without a part": (
        "a.1.jpg a.2.jpg a.2.txt a.3.txt a.4.jpg",
        {"a.2": (20, says("a.2.txt"))},
        {NO_CAPTION: 2, NO_IMAGE: 1},
        {},
    ),
    "endings of several parts": (
        (
            "0.input.jpg 0.caption.txt 1.jpg 1.cls.txt 1.txt 2.jpg 2.cls 2.en.txt "
            "3.left.jpg 3.right.jpg 3.txt"
        ),
        {
            "0": (10, says("0.caption.txt")),
            "1": (20, says("1.txt")),
            "2": (30, says("2.en.txt")),
            "3": (40, says("3.txt")),
        },
        {},
        {OTHER_IMAGE: 1},
    ),
    "labels are no captions": (
        "0.jpg 0.cls.txt 1.jpg 1.cls 2.jpg 2.txt",
        {"2": (30, says("2.txt"))},
        {NO_CAPTION: 2},
        {},
    ),
    "masks": (
        (
            "1.seg.png 1.jpg 1.txt 2.jpg 2.depth.png 2.seg.json 2.txt 3.mask.png 3.txt "
            "4.b.png 4.b.txt 4.b.seg.png"
        ),
        {"1": (20, says("1.txt")), "2": (30, says("2.txt")), "4.b": (60, says("4.b.txt"))},
        {NO_IMAGE: 1},
        {},
    ),
    "repeated keys": (
        "0.jpg 0.txt 0.jpg 0.txt 1.jpg 1.jpg 1.txt",
        {"0": (10, says("0.txt")), "0#2": (20, says("0.txt", 2)), "1": (40, says("1.txt"))},
        {NO_CAPTION: 1},
        {},
    ),
    "all images first": (
        "0.jpg 1.jpg 2.jpg 3.jpg 0.txt 2.txt 1.txt 4.txt",
        {"0": (10, says("0.txt")), "1": (20, says("1.txt")), "2": (30, says("2.txt"))},
        {NO_CAPTION: 1, NO_IMAGE: 1},
        {},
    ),
    "repeated keys apart": (
        "0.jpg 1.jpg 0.jpg 1.txt 0.txt",
        {"1": (20, says("1.txt"))},
        {REPEATED: 3},
        {},
    ),
    "parts that come late": (
        "0.jpg 0.txt 1.jpg 1.txt 0.cls 1.seg.png",
        {"0": (10, says("0.txt")), "1": (20, says("1.txt"))},
        {},
        {},
    ),
    "hidden files": (
        ("._0.jpg 0.jpg .DS_Store 0.txt d/._1.txt __MACOSX/d/._1.jpg d/1.jpg d/1.txt .cache/2.jpg"),
        {"0": (20, says("0.txt")), "d/1": (40, says("d/1.txt"))},
        {},
        {},
    ),
    "folders, capitals, and what is no sample": (
        "./a/0.JPG ./a/0.TXT b/0.Jpeg b/0.txt README",
        {"a/0": (10, says("./a/0.TXT")), "b/0": (20, says("b/0.txt"))},
        {NO_IMAGE: 1},
        {},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_which_members_are_one_sample(tmp_path: pathlib.Path, case: str) -> None:
    names, records, dropped, parts = CASES[case]
    split = re.findall(r"\S+ y\.\w+|\S+", names)
    (tmp_path / "a.tar").write_bytes(packed(named(split)))
    assert found(tmp_path / "a.tar") == (records, dropped, parts)


def webdataset_key(name: str) -> tuple[str, str]:
    """The rule of the WebDataset library, as its documentation gives it."""
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    assert match
    return match.group(1), match.group(2)


def test_neighbours_without_dots_in_their_names_are_those_of_webdataset(
    tmp_path: pathlib.Path,
) -> None:
    drawn = random.Random(0)
    endings = [
        "jpg",
        "txt",
        "json",
        "cls",
        "seg.png",
        "input.png",
        "a.b.npy",
        "depth.png",
        "cls.txt",
    ]
    names = []
    for number in range(200):
        folder = drawn.choice(["", "d/", "d.1/e/"])
        names += [
            f"{folder}{number:04d}.{ending}"
            for ending in drawn.sample(endings, drawn.randint(1, 6))
        ]
    (tmp_path / "a.tar").write_bytes(packed((name, b"") for name in names))
    expected = {
        key: {webdataset_key(name)[1] for name in group}
        for key, group in itertools.groupby(names, key=lambda name: webdataset_key(name)[0])
    }
    met = [sample for sample in samples(tmp_path / "a.tar") if isinstance(sample, TarSample)]
    assert {sample.key: set(sample.members) for sample in met} == expected


@pytest.mark.parametrize("seed", range(4))
def test_every_sample_is_used_or_counted_whatever_its_name_and_place(
    tmp_path: pathlib.Path, seed: int
) -> None:
    """Names with dots and without, parts that lack, neighbours, by kind, or in any order."""
    drawn = random.Random(seed)
    stems = [f"{number}" for number in range(30)] + [f"x.{number}" for number in range(30)]
    stems += [f"photo {number}.of.{number % 7}" for number in range(30)]
    drawn.shuffle(stems)
    has = {stem: drawn.choice([(1, 1), (1, 1), (1, 0), (0, 1)]) for stem in stems}
    names = [
        f"{stem}.{ending}"
        for stem in stems
        for ending, there in zip(("jpg", "txt"), has[stem])
        if there
    ]
    if seed % 2:
        names.sort(key=lambda name: name.rsplit(".", 1)[1])
    elif seed:
        drawn.shuffle(names)
    (tmp_path / "a.tar").write_bytes(packed((name, name.encode()) for name in names))
    met = list(samples(tmp_path / "a.tar"))
    whole = {
        sample.key: sample
        for sample in met
        if isinstance(sample, TarSample) and sample.image and sample.text
    }
    assert whole.keys() == {stem for stem in stems if has[stem] == (1, 1)}
    for stem, sample in whole.items():
        assert (
            sample.image.read() == f"{stem}.jpg".encode()
            and sample.text.read() == f"{stem}.txt".encode()
        )
    alone = collections.Counter(
        "jpg" if sample.image else "txt" for sample in met if sample.key not in whole
    )
    assert alone == {
        "jpg": sum(h == (1, 0) for h in has.values()),
        "txt": sum(h == (0, 1) for h in has.values()),
    }


def test_samples_of_one_key_are_in_one_split(tmp_path: pathlib.Path) -> None:
    members = named(
        f"{number}.{ending}" for number in range(12) for _ in range(2) for ending in ("jpg", "txt")
    )
    (tmp_path / "a.tar").write_bytes(packed(members))
    write_dataset(tmp_path / "out", WebDataset((str(tmp_path),), SplitFractions(0.4)))
    keys = [
        {name.partition("#")[0] for name in read(tmp_path / "out", split)}
        for split in ("train", "validation")
    ]
    assert all(keys) and keys[0].isdisjoint(keys[1])


COMPRESSED: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("a.tar", gzip.compress),
    ("a.tar.gz", gzip.compress),
    ("a.tgz", gzip.compress),
    ("b.tar", bz2.compress),
    ("b.tar.bz2", bz2.compress),
    ("c.tar", lzma.compress),
    ("c.tar.xz", lzma.compress),
]
NAMES = [f"{number}.{ending}" for number in range(20) for ending in ("jpg", "json", "txt")]


@pytest.mark.parametrize(
    "name, compress", COMPRESSED, ids=lambda one: one if isinstance(one, str) else ""
)
@pytest.mark.parametrize("apart", [False, True])
def test_compressed_shards_are_read(
    tmp_path: pathlib.Path, name: str, compress, apart: bool, monkeypatch
) -> None:
    names = sorted(NAMES, key=lambda name: name.rsplit(".", 1)[1]) if apart else NAMES
    (tmp_path / "plain.tar").write_bytes(packed(named(names)))
    (tmp_path / name).write_bytes(compress(packed(named(names))))
    opened = []
    monkeypatch.setattr(byte_ranges, "_STREAMS", streams := byte_ranges._Streams())
    before = streams._before
    monkeypatch.setattr(
        streams, "_before", lambda *place: opened.append(len(streams._open)) or before(*place)
    )
    (records, dropped, _), (expected, none, _) = (
        found(tmp_path / name),
        found(tmp_path / "plain.tar"),
    )
    assert (records, dropped) == (expected, none) and len(records) == 20
    # Read on from where it is, not from the start for every image.
    assert streams._opened == (3 if apart else 1)
    assert max(opened) <= byte_ranges.STREAMS


def test_what_cannot_be_unpacked_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packed(named(NAMES))
    monkeypatch.setattr(
        byte_ranges,
        "COMPRESSIONS",
        (
            *byte_ranges.COMPRESSIONS[:3],
            byte_ranges.Compression("zstd", b"\x28\xb5\x2f\xfd"),
            *byte_ranges.COMPRESSIONS[4:],
        ),
    )

    def reasons(data: bytes) -> list[str]:
        (tmp_path / "a.tar").write_bytes(data)
        return [met for met in samples(tmp_path / "a.tar") if isinstance(met, str)]

    assert reasons(b"\x28\xb5\x2f\xfd" + whole) == [
        "shard compressed with zstd, which needs Python 3.14 or backports.zstd"
    ]
    assert reasons(b"\x04\x22\x4d\x18" + whole) == ["shard compressed with lz4, which is not read"]
    assert reasons(gzip.compress(b"no tar at all" * 100)) == [tars.NO_TAR]
    assert reasons(gzip.compress(whole)[:-9][: len(gzip.compress(whole)) // 2]) == [tars.TRUNCATED]
    kinds = set()
    for seed in range(12):
        damaged = bytearray(gzip.compress(whole))
        middle = len(damaged) // 2
        damaged[middle : middle + 100] = random.Random(seed).randbytes(100)
        with pytest.raises((zlib.error, gzip.BadGzipFile)) as caught:
            gzip.decompress(bytes(damaged))
        kinds.add(caught.type)
        assert set(reasons(bytes(damaged))) == {tars.DAMAGED}
    assert len(kinds) == 2
    monkeypatch.setattr(tars, "MAX_UNPACKED", 10_000)
    assert reasons(gzip.compress(whole)) == [tars.TOO_LONG]
    assert reasons(whole) == []


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_damage_costs_no_more_than_it_hits(
    tmp_path: pathlib.Path, pack: Callable[[bytes], bytes]
) -> None:
    """A cut at every half block, and a flipped header: what comes before is read, and one
    reason tells of the rest.
    """
    whole = packed(named(f"{number}.{ending}" for number in range(4) for ending in ("jpg", "txt")))
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
        starts = [member.offset for member in tar]
    for cut in range(700, ends[-1], 1_279):
        path.write_bytes(pack(whole[:cut]))
        met = list(samples(path))
        told = [name for sample in met if isinstance(sample, TarSample) for name in sample.members]
        assert len(told) == sum(end <= cut for end in ends)
        lost = [reason for reason in met if isinstance(reason, str)]
        between = any(end <= cut <= start for end, start in zip(ends, starts[1:]))
        assert len(lost) == (0 if between else 1) and set(lost) <= {
            tars.TRUNCATED,
            tars.DAMAGED,
        }
    hurt = bytearray(whole)
    hurt[starts[3]] ^= 1
    path.write_bytes(pack(bytes(hurt)))
    met = list(samples(path))
    assert [one for one in met if isinstance(one, str)] == [tars.DAMAGED]
    assert sum(len(one.members) for one in met if isinstance(one, TarSample)) == 7


def test_a_plain_shard_whose_first_name_looks_compressed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.tar").write_bytes(packed(named(["BZh9.jpg", "BZh9.txt"])))
    assert found(tmp_path / "a.tar")[0] == {"BZh9": (10, says("BZh9.txt"))}


def test_pieces_of_compressed_files_in_any_order_and_after_a_change(
    tmp_path: pathlib.Path,
) -> None:
    data = random.Random(0).randbytes(50_000)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(data))
    for offset in (0, 40_000, 7, 41_000, 12_345, 0, 49_990):
        assert (
            byte_ranges.ByteRange(str(path), offset, 10, packed=True).read()
            == data[offset : offset + 10]
        )
    for offset, size in ((49_995, 10), (60_000, 1)):
        with pytest.raises(OSError, match="does not hold"):
            byte_ranges.ByteRange(str(path), offset, size, packed=True).read()
    path.write_bytes(gzip.compress(data[::-1]))
    assert (
        byte_ranges.ByteRange(str(path), 45_000, 10, packed=True).read()
        == data[::-1][45_000:45_010]
    )
    path.write_bytes(gzip.compress(data)[:-20_000])
    with pytest.raises(OSError, match="cannot be unpacked"):
        byte_ranges.ByteRange(str(path), 49_000, 10, packed=True).read()


def test_images_are_not_looked_up_in_compressed_shards(tmp_path: pathlib.Path) -> None:
    members = [("0.jpg", image(10)), ("0.json", b'{"url": "http://x/1"}')]
    (tmp_path / "0.tar").write_bytes(packed(members))
    assert len(by_address([str(tmp_path)])) == 1
    (tmp_path / "1.tar").write_bytes(gzip.compress(packed(members)))
    with pytest.raises(UserError, match=r"1.tar is compressed \(gzip\).*unpack it"):
        by_address([str(tmp_path)])


@pytest.mark.parametrize("form", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_what_a_header_claims_is_not_read_at_once(tmp_path: pathlib.Path, form: bytes) -> None:
    claiming = tarfile.TarInfo("claims")
    claiming.type, claiming.size = form, 1 << 30
    whole = named(["0.jpg", "0.txt"])
    data = claiming.tobuf() + bytes(2 << 20) + packed(whole)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data, 1))
    tracemalloc.start()
    met = list(tars.members(tmp_path / "a.tar.gz"))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 << 20
    assert [member.name for member in met if isinstance(member, tars.TarMember)] == [
        "0.jpg",
        "0.txt",
    ]
    assert [reason for reason in met if isinstance(reason, str)] == [tars.DAMAGED]


def test_a_long_damaged_stretch_takes_no_memory(tmp_path: pathlib.Path) -> None:
    """And the members behind it are found."""
    stretch = random.Random(0).randbytes(tars.BLOCK) * 5_000
    data = packed(named(["0.txt"]))[:1024] + stretch + packed(named(["1.txt"]))
    (tmp_path / "a.tar").write_bytes(data)
    tracemalloc.start()
    met = list(tars.members(tmp_path / "a.tar"))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000
    assert [member if isinstance(member, str) else member.name for member in met] == [
        "0.txt",
        tars.DAMAGED,
        "1.txt",
    ]
