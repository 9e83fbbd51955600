"""Damage among the records of every source is counted by reason, stops nothing, and nothing is
written but the dataset; so is damage on disk later.
"""

import hashlib
import io
import json
import pathlib
import tarfile
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.batches import make_iterator
from data_pipelines.build.coco import Coco
from data_pipelines.build.html_pages import HtmlPages
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.mmc4 import Mmc4
from data_pipelines.build.obelics import Obelics
from data_pipelines.build.plain_text import PlainText
from data_pipelines.build.questions_folder import QuestionsFolder
from data_pipelines.build.source import Source
from data_pipelines.build.tfds import Tfds
from data_pipelines.build.video_folder import VideoFolder
from data_pipelines.build.webdataset import WebDataset
from data_pipelines.build.writer import write_dataset
from data_pipelines.records import UNREADABLE, open_records
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.processing.tokenizer import Tokenizer
from tests.data_pipelines.raw import ALL_TRAIN, colourful, film, huge_png, lines, read

WHOLE_BATCH = 12
NOT_UTF8 = b"caf\xe9 noir"


def png(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(colourful(80, 90, seed=number)).save(data, "PNG")
    return data.getvalue()


def flipped(data: bytes) -> bytes:
    """One bit of the image's compressed part."""
    place = data.index(b"IDAT") + 40
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def damaged() -> dict[str, tuple[bytes, bytes]]:
    """(image, caption) by name: whole ones, and one for each sort of damage."""
    whole = {
        f"{number:02d}": (png(number), f"caption {number}".encode())
        for number in range(WHOLE_BATCH)
    }
    hurt = {
        "truncated": png(20)[:-300],
        "flipped": flipped(png(21)),
        "empty": b"",
        "html": b"<html>not found</html>",
        "bomb": huge_png(60_000),
    }
    return (
        whole
        | {name: (data, b"never seen") for name, data in hurt.items()}
        | {"latin": (png(22), NOT_UTF8)}
    )


BAD_IMAGES = {"unreadable": 4, "too many pixels": 1}


def fill(folder: pathlib.Path) -> dict[str, str]:
    """The images as files; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (data, _) in damaged().items():
        (folder / f"{name}.png").write_bytes(data)
    return {name: f"{name}.png" for name in damaged()}


def image_folder(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    names = fill(root)
    told = [
        b'{"image": "%s", "caption": "%s"}\n' % (names[name].encode(), caption)
        for name, (_, caption) in damaged().items()
    ]
    (root / "captions.jsonl").write_bytes(
        b"".join([*told, b'{"image": "00.p', b"\n\xff\xfe\x00\n", b"[" * 100_000, b"\n"])
    )
    source = ImageFolder((str(root),), ALL_TRAIN)
    return source, BAD_IMAGES | {
        "text that is not UTF-8": 1,
        "no caption": 1,
        "caption line that is not JSON with a name and captions": 3,
    }


def questions_folder(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    names = fill(root)
    told = [
        b'{"image": "%s", "question": "what?", "answer": "%s"}\n' % (names[name].encode(), caption)
        for name, (_, caption) in damaged().items()
    ]
    (root / "qa.jsonl").write_bytes(b"".join([*told, b'{"image": "00.p', b"\n\xff\xfe\x00\n"]))
    reasons = {
        "text that is not UTF-8": 1,
        "no question": 1,
        "line that is not JSON with an image, a question and answers": 2,
    }
    return QuestionsFolder((str(root),), ALL_TRAIN), BAD_IMAGES | reasons


def video_folder(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    film(root / "00.avi", 2)
    whole = (root / "00.avi").read_bytes()
    for number in range(1, WHOLE_BATCH):
        (root / f"{number:02d}.avi").write_bytes(whole)
    mp4 = root / "x.mp4"
    film(mp4, 2)
    clip = mp4.read_bytes()
    hurt = {
        "truncated.mp4": clip[: len(clip) // 2],
        "empty.mp4": b"",
        "html.mp4": b"<html>",
        "bomb.png": huge_png(60_000),
        "x.mp4": b"\xff",
    }
    for name, data in hurt.items():
        (root / name).write_bytes(data)
    told = [
        json.dumps({"video": f"{number:02d}.avi", "caption": "grey"}).encode()
        for number in range(WHOLE_BATCH)
    ]
    told += [json.dumps({"video": name, "caption": "never seen"}).encode() for name in hurt]
    (root / "videos.jsonl").write_bytes(
        b"\n".join([*told, b'{"video": "00.avi", "caption": "%s"}' % NOT_UTF8])
    )
    foreign = {"not a video, or one that names other files": 1}
    reasons = foreign | {"unreadable": 4, "text that is not UTF-8": 1}
    return VideoFolder((str(root),), ALL_TRAIN), reasons


def html_pages(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    names = fill(root)
    for name, (_, caption) in damaged().items():
        (root / f"{name}.html").write_bytes(
            b'<p>%s<img src="%s"><img src="../../secret.png">' % (caption, names[name].encode())
        )
    (root / "zero.html").write_bytes(b"")
    (root / "noise.html").write_bytes(bytes(range(256)) * 40)
    return HtmlPages((str(root),), ALL_TRAIN), {
        "page without an image that is fit": 6,
        "unreadable page": 1,
    }


def webdataset(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    root.mkdir()

    def member(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for key, value in fields.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(data))

    with tarfile.open(root / "00000.tar", "w") as tar:
        for name, (data, caption) in damaged().items():
            member(tar, f"{name}.png", data)
            member(tar, f"{name}.txt", caption)
        for name in ("../../outside.png", "/tmp/outside.png", "a/../../outside.png"):
            member(tar, name, png(1))
        member(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        member(tar, "hard.png", type=tarfile.LNKTYPE, linkname="../../outside.png")
        member(tar, "device.png", type=tarfile.CHRTYPE)
        member(tar, "broken.json", b'{"caption": ')
        member(tar, "broken.png", png(2))
        member(tar, "alone.txt", b"no image")
    whole = (root / "00000.tar").read_bytes()
    # A flipped bit in the header of one member, of the second of whose two blocks the image
    # is.
    place = whole.index(b"03.txt\0")
    (root / "00000.tar").write_bytes(whole[:place] + b"1" + whole[place + 1 :])
    cut = whole.index(b"01.png\0") + 512 + 100
    (root / "00001.tar").write_bytes(whole[:cut])
    (root / "00002.tar").write_bytes(b"no tar at all" * 1_000)
    (root / "00003.tar").write_bytes(b"")
    reasons = {
        "text that is not UTF-8": 1,
        "member whose name leads out of the shard": 3,
        "member that is a link or a device": 3,
        "damaged stretch of a shard": 1,
        "cut off in the shard": 1,
        "shard that is no tar file": 2,
        "no image": 1,
        "caption file that is not JSON with a caption": 1,
        "no caption": 1,
    }
    return WebDataset((str(root),), ALL_TRAIN), BAD_IMAGES | reasons


def coco(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    names = fill(root / "images")
    images = [{"id": number, "file_name": file} for number, file in enumerate(names.values())]
    told = [{"image_id": number, "caption": f"<{number}>"} for number in range(len(names))]
    images += [
        {"id": 900, "file_name": "../../secret.png"},
        {"id": 901, "file_name": "gone.png"},
        {"file_name": "x.png"},
        7,
        {"id": [1], "file_name": "x"},
    ]
    told += [
        {"image_id": 900, "caption": "x"},
        {"image_id": 901, "caption": "x"},
        {"image_id": 555, "caption": "x"},
        "x",
        {"image_id": 1, "caption": 3},
    ]
    text = json.dumps({"images": images, "annotations": told}).encode()
    for number, (_, caption) in enumerate(damaged().values()):
        text = text.replace(b"<%d>" % number, caption)
    (root / "captions.json").write_bytes(text)
    reasons = {
        "text that is not UTF-8": 1,
        "no caption": 1,
        "missing": 1,
        "outside the folder": 1,
    }
    reasons |= {
        "image without an id and a file name": 3,
        "annotation without a caption for one of the images": 3,
    }
    return (
        Coco((str(root / "captions.json"),), (str(root / "images"),), ALL_TRAIN),
        BAD_IMAGES | reasons,
    )


def mmc4(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    names = fill(root)
    image = b'{"image_name": "%s", "matched_text_index": 0, "matched_sim": 0.3}'
    line = b'{"text_list": ["%s"], "image_info": [' + image + b'], "similarity_matrix": [[0.3]]}\n'
    told = [line % (caption, names[name].encode()) for name, (_, caption) in damaged().items()]
    odd = [
        b"{}\n",
        b'{"text_list": "x", "image_info": 3}\n',
        line[:40] + b"\n",
        b"\0\0\0\n",
        line % (b"x", b"../../secret.png"),
    ]
    (root / "docs.jsonl").write_bytes(b"".join(told + odd))
    reasons = {
        "text that is not UTF-8": 1,
        "page without an image that is fit": 6,
        "line that is not JSON with sentences and images": 4,
    }
    return Mmc4((str(root),), (), ALL_TRAIN), reasons


def obelics(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root.mkdir()
    images = [[{"bytes": data, "path": None}, None] for data, _ in damaged().values()] + [None]
    texts = arrow.array(
        [[None, caption] for _, caption in damaged().values()] + [[None, b"x"]],
        arrow.list_(arrow.binary()),
    )
    # Bytes that are no UTF-8 in a column that says it is.
    texts = texts.view(arrow.list_(arrow.string()))
    parquet.write_table(arrow.table({"images": images, "texts": texts}), root / "a.parquet")
    parquet.write_table(arrow.table({"texts": ["x"]}), root / "b.parquet")
    (root / "c.parquet").write_bytes((root / "a.parquet").read_bytes()[:-100])
    (root / "d.parquet").write_bytes(b"")
    noise = [[np.random.default_rng(number).bytes(3_000).hex()] for number in range(40)]
    parquet.write_table(
        arrow.table({"images": [[None]] * 40, "texts": noise}),
        root / "e.parquet",
        row_group_size=20,
        write_page_checksum=True,
    )
    data = bytearray((root / "e.parquet").read_bytes())
    data[len(data) // 4] ^= 16
    (root / "e.parquet").write_bytes(data)
    reasons = {
        "text that is not UTF-8": 1,
        "page without an image that is fit": 5 + 20,
        "row of a damaged part of a parquet file": 20,
    }
    return Obelics((str(root),), (), ALL_TRAIN), reasons | {
        "unreadable parquet file": 2,
        "parquet file without columns images and texts": 1,
        "row without lists of images and texts": 1,
    }


def prepared(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    images, texts = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    made = {
        name: {"image": io.BytesIO(data), "caption": caption}
        for name, (data, caption) in damaged().items()
    }
    made |= {
        f"x{number}": {
            "image": io.BytesIO(np.random.default_rng(number).bytes(20_000)),
            "caption": "x",
        }
        for number in range(20)
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.3")
        name = "public"

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"image": images, "caption": texts}),
            )

        def _split_generators(self, manager: object) -> dict[str, object]:
            return {"train": made.items()}

        def _generate_examples(self) -> None:
            raise NotImplementedError

    Builder(data_dir=str(root), file_format="array_record").download_and_prepare()
    (file,) = root.glob("public/1.2.3/*-train.array_record*")
    data = bytearray(file.read_bytes())
    data[data.index(np.random.default_rng(0).bytes(20_000)[:50]) + 100] ^= 1
    file.write_bytes(data)
    return Tfds(str(root / "public"), ALL_TRAIN), {
        "unreadable": 4 + 19,
        "too many pixels": 1,
        "text that is not UTF-8": 1,
        "unreadable record": 1,
    }


def plain_text(root: pathlib.Path) -> tuple[Source, dict[str, int]]:
    root.mkdir()
    for number in range(WHOLE_BATCH):
        (root / f"{number:02d}.txt").write_text(f"text {number}")
    (root / "empty.txt").write_bytes(b"")
    (root / "latin.txt").write_bytes(NOT_UTF8)
    (root / "image.txt").write_bytes(png(1))
    return PlainText((str(root),), ALL_TRAIN), {"empty": 1, "not UTF-8": 2}


SOURCES = [
    image_folder,
    questions_folder,
    video_folder,
    html_pages,
    webdataset,
    coco,
    mmc4,
    obelics,
    prepared,
    plain_text,
]


def files(folder: pathlib.Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_damage_is_counted_and_stops_nothing(
    make: Callable[[pathlib.Path], tuple[Source, dict[str, int]]], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "secret.png").write_bytes(png(99))
    source, dropped = make(tmp_path / "raw")
    before = files(tmp_path)
    statistics, _ = write_dataset(tmp_path / "out", source)
    assert statistics["dropped"] == dropped
    records = read(tmp_path / "out")
    assert (
        statistics["records_read"] == statistics["used"] + sum(dropped.values())
        and len(records) == statistics["used"]
    )
    spoken = [str(text) for record in records.values() for text in record.values()]
    assert not any("never seen" in text for text in spoken)
    after = files(tmp_path)
    assert before.items() <= after.items()
    assert all(
        pathlib.Path(path).is_relative_to(tmp_path / "out" / "1.0.0")
        for path in after.keys() - before.keys()
    )
    assert not pathlib.Path("/tmp/outside.png").exists()


@pytest.mark.parametrize(
    "kind, task",
    [
        ("pairs", "flamingo"),
        ("pairs", "contrastive"),
        ("pages", "flamingo"),
        ("text", "language_modelling"),
    ],
)
def test_a_record_damaged_on_disk_is_left_out_of_the_loss(
    kind: str,
    task: str,
    tokenizer: Tokenizer,
    tmp_path: pathlib.Path,
    caplog,
) -> None:
    """Before its length is measured and after."""
    rng = np.random.default_rng(0)
    root = tmp_path / "raw"
    root.mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (70, 70, 3), np.uint8)).save(root / f"{number}.png")
        (root / f"{number}.html").write_text(f'red<img src="{number}.png">star {number}')
        (root / f"{number}.txt").write_text(" ".join(map(str, rng.integers(0, 10**6, 900))))
    lines(
        root / "captions.jsonl",
        *({"image": f"{number}.png", "caption": f"star {number}"} for number in range(40)),
    )
    source = {"pairs": ImageFolder, "pages": HtmlPages, "text": PlainText}[kind](
        (str(root),), ALL_TRAIN
    )
    write_dataset(tmp_path / "out", source)
    folder = tmp_path / "out" / "1.0.0"
    config = DatasetConfig(kind=kind, path=str(folder), batch_size=1, max_length=64, visuals=2)

    def targets() -> tuple[int, list[str]]:
        it = make_iterator(config, tokenizer=tokenizer, task=task, image_size=8, text_length=24)
        count = sum(
            int(next(it)["mask" if task == "contrastive" else "loss_mask"].sum())
            for _ in range(it.summary()["rows"])
        )
        return count, it.summary()["failed"]

    whole, failed = targets()
    assert not failed
    (file,) = folder.glob("*-train.array_record*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    source = open_records(folder, "train", kind)
    (hurt,) = [place for place, record in enumerate(source) if UNREADABLE in record]
    for _ in range(2):
        left, failed = targets()
        assert failed == [f"#{hurt}"] and whole * 0.8 < left < whole
        for kept in folder.glob("lengths_*"):
            kept.unlink()
    assert any(f"record {hurt} of " in message for message in caplog.messages)
