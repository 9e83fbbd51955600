"""Texts as people's files hold them: every record is used, or counted for a reason that is
true.
"""

import base64
import io
import json
import pathlib
import tarfile
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.build.coco import Coco
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.mmc4 import Mmc4
from data_pipelines.build.obelics import END_OF_DOCUMENT, Obelics
from data_pipelines.build.questions_folder import QuestionsFolder
from data_pipelines.build.source import Source
from data_pipelines.build.text_files import TooLongLine, decode, json_lines, text_lines
from data_pipelines.build.tfds import Tfds
from data_pipelines.build.webdataset import WebDataset
from tests.data_pipelines.raw import ALL_TRAIN, accounted, colourful, lines, read, save, strings
from tests.data_pipelines.test_public_sources import document, prepare, shard, shown

EMPTY, NO_TEXT, NOT_UTF8 = (
    "empty text",
    "text that is none (a number, a list)",
    "text that is not UTF-8",
)
HALF = "half of an emoji: \ud83d"


def texts_dropped(output: pathlib.Path) -> dict[str, int]:
    """The texts that records lost; those used, which the statistics count too, are on disk."""
    told = json.loads((output / "1.0.0" / "statistics.json").read_text())["texts"]
    fields = ("captions", "answers", "texts")
    found = [len(record.get(field, ())) for record in read(output).values() for field in fields]
    assert told["used"] == sum(found)
    return told["dropped"]


# The one reader of lines.


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone(tmp_path: pathlib.Path, encoding: str, end: str) -> None:
    told = ["one\u2028still one\x85and\x0cso on", "", "zwei\rstill", "drei 漢字", "last"]
    (tmp_path / "a").write_bytes(end.join(told).encode(encoding))
    assert list(text_lines(tmp_path / "a")) == told
    assert decode((tmp_path / "a").read_bytes()) == "\n".join(told)
    records = [{"text": text} for text in told]
    text = end.join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "b").write_bytes(text.encode(encoding))
    assert list(json_lines(tmp_path / "b")) == records


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lines_have_a_bound(tmp_path: pathlib.Path, encoding: str) -> None:
    sizes = [9, 10, 11, 12, 13, 5_000_000, 10]
    text = "".join("x" * size + end for size, end in zip(sizes, ["\n", "\r\n"] * 4))
    (tmp_path / "a").write_bytes(text.encode(encoding))
    read = [len(line) if isinstance(line, str) else None for line in text_lines(tmp_path / "a", 10)]
    assert read == [9, 10, None, None, None, None, 10]


@pytest.mark.parametrize("start", [b"", "\ufeff".encode("utf-16-le"), "\ufeff".encode("utf-16-be")])
def test_bytes_of_no_encoding_are_of_no_text(tmp_path: pathlib.Path, start: bytes) -> None:
    """Half of a pair in UTF-16, and a byte that is left over."""
    (tmp_path / "a").write_bytes(start + b"\xd8\xd8\xff")
    for text in (decode((tmp_path / "a").read_bytes()), *text_lines(tmp_path / "a")):
        assert not isinstance(text, TooLongLine)
        with pytest.raises(UnicodeEncodeError):
            text.encode()


# Captions and questions.


def image_folder(root: pathlib.Path) -> Source:
    for name in ("a", "b", "c", "d", "e"):
        save(root / f"{name}.png", colourful(seed=ord(name)))
    told: list[Any] = [
        {"image": "a.png", "captions": ["one", None, "", "  ", HALF, 3, {"caption": "two"}]},
        {"image": "b.png", "captions": None, "caption": "three"},
        {"image": "b.png", "caption": None},
        {"image": "c.png", "caption": float("nan")},
        {"image": "d.png", "captions": [None, ""]},
        {"image": "d.png", "captions": [7, None]},
        {"image": "", "caption": "no name"},
        {"image": None, "caption": "no name"},
        "[1",
        "\ufeff{}",
    ]
    text = "\r\n".join(t if isinstance(t, str) else json.dumps(t) for t in told)
    (root / "captions.jsonl").write_bytes(text.encode("utf-16"))
    return ImageFolder((str(root),), ALL_TRAIN)


def test_one_bad_caption_costs_no_other(tmp_path: pathlib.Path) -> None:
    bad_line = "caption line that is not JSON with a name and captions"
    records = accounted(
        tmp_path / "out", image_folder(tmp_path / "raw"), {bad_line: 5, "no caption": 3}
    )
    told = {name: strings(record["captions"]) for name, record in records.items()}
    assert told == {"a.png": ["one", "two"], "b.png": ["three"]}
    assert texts_dropped(tmp_path / "out") == {EMPTY: 3 + 1 + 1 + 2, NOT_UTF8: 1, NO_TEXT: 1}


def test_captions_within_shards_too(tmp_path: pathlib.Path) -> None:
    png = save(tmp_path / "a.png", colourful())
    bom = json.dumps({"captions": None, "text": "two"}).encode("utf-16")
    shard(
        tmp_path / "0.tar",
        {
            "0.png": png,
            "0.json": json.dumps({"captions": ["one", None, HALF]}).encode(),
            "1.png": png,
            "1.json": bom,
            "2.png": png,
            "2.txt": "\ufeffthree".encode(),
            "3.png": png,
            "3.json": b'{"caption": null}',
        },
    )
    records = accounted(
        tmp_path / "out", WebDataset((str(tmp_path),), ALL_TRAIN), {"no caption": 1}
    )
    assert [strings(record["captions"]) for record in records.values()] == [
        ["one"],
        ["two"],
        ["three"],
    ]
    assert texts_dropped(tmp_path / "out") == {EMPTY: 2, NOT_UTF8: 1}


def test_questions_as_vqa_and_tables_have_them(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "raw"
    save(root / "a.png", colourful())
    lines(
        root / "qa.jsonl",
        {
            "image": "a.png",
            "question": "vqa?",
            "type": 3,
            "answers": [
                {"answer": "yes", "answer_confidence": "maybe", "answer_id": 1},
                {"answer": "no"},
                {"answer": ""},
                {"id": 2},
            ],
        },
        {
            "image": "a.png",
            "video": None,
            "question": "table?",
            "answers": None,
            "answer": "x",
            "type": float("nan"),
        },
        {"image": "a.png", "question": "number?", "answer": 2.5},
        {"image": "a.png", "question": "null?", "answer": None},
        {"image": "a.png", "question": None, "answer": "x"},
        {"image": "a.png", "question": "", "answer": "x"},
        {"image": "a.png", "question": 5, "answer": "x"},
        {"question": "no image?", "answer": "x"},
    )
    bad_line = "line that is not JSON with an image, a question and answers"
    dropped = {bad_line: 2, "no answer": 1, "no question": 2}
    records = accounted(tmp_path / "out", QuestionsFolder((str(root),), ALL_TRAIN), dropped)
    told = {
        r["question"].decode(): (strings(r["answers"]), r["type"].decode())
        for r in records.values()
    }
    assert told == {
        "vqa?": (["yes", "no"], "3"),
        "table?": (["x"], ""),
        "number?": (["2.5"], ""),
    }
    assert texts_dropped(tmp_path / "out") == {EMPTY: 3}


# Public datasets.


def test_coco_ids_meet_whatever_wrote_them(tmp_path: pathlib.Path) -> None:
    for number in range(6):
        save(tmp_path / f"{number}.png", colourful(seed=number))
    save(tmp_path / "more" / "0.png", colourful(seed=9))
    images = [
        {"id": number, "file_name": f"{name}.png"}
        for number, name in (("0", 0), (1, 1), (2.0, 2), ("x", 3), (4, 4), (5, 0))
    ]
    images += [{"id": True, "file_name": "5.png"}, {"id": 7, "file_name": ""}]
    images += [{"id": 1, "file_name": "1.png"}, {"id": 4, "file_name": "5.png"}]
    told = [
        (0, "zero"),
        ("1", "one"),
        (2, "two"),
        ("2", None),
        ("x", "three"),
        ("x", ""),
        (5, "again"),
        (4, None),
        (6, "of none"),
        (1, 8),
    ]
    annotations = [{"image_id": image, "caption": text} for image, text in told]
    (tmp_path / "coco.json").write_bytes(
        json.dumps({"images": images, "annotations": annotations}).encode("utf-8-sig")
    )
    dropped = {
        "image without an id and a file name": 2,
        "image of an id that another has": 1,
        "annotation without a caption for one of the images": 2,
        "no caption": 1,
    }
    records = accounted(
        tmp_path / "out", Coco((str(tmp_path / "coco.json"),), (), ALL_TRAIN), dropped
    )
    assert {name: strings(record["captions"]) for name, record in records.items()} == {
        "0.png": ["zero"],
        "1.png": ["one"],
        "2.png": ["two"],
        "3.png": ["three"],
        "0.png#5": ["again"],
    }
    assert texts_dropped(tmp_path / "out") == {EMPTY: 3}


def test_mmc4_of_tables_and_of_open_flamingo(tmp_path: pathlib.Path) -> None:
    data = {
        number: save(tmp_path / f"{number}.png", colourful(seed=number)) for number in (1, 2, 3)
    }
    within = {number: base64.b64encode(data[number]).decode() for number in data}
    nan = float("nan")
    told = [
        document(["A.", "B."], [shown(1, 1.0), shown(2, 0.0, nan)]),
        document(
            ["A.", "B."],
            [shown(1, nan, nan), shown(2, nan)],
            similarity_matrix=[[0.1, 0.3], [0.2, 0.1]],
        ),
        document(["A.", "B."], [shown(1, 0.5), shown(2, 2.0), shown(3, 0)]),
        document(
            ["A."],
            [
                {"image_base64": within[3], "matched_text_index": 0},
                {"image_base64": "?", "matched_text_index": 0},
            ],
        ),
        document(["A.", None, HALF, "D.\u2028E."], [shown(1, 1), shown(2, 3)]),
        document([None, 4], [shown(1, 0)]),
        "\u2028",
        "null",
    ]
    text = "\n".join(t if isinstance(t, str) else json.dumps(t) for t in told)
    text = text.replace("\\u2028", "\u2028")
    (tmp_path / "docs.jsonl").write_bytes(text.encode("utf-8-sig"))
    dropped = {"line that is not JSON with sentences and images": 2}
    lost = {"matched to no sentence": 2, "unreadable": 1}
    records = accounted(tmp_path / "out", Mmc4((str(tmp_path),), (), ALL_TRAIN), dropped, lost)
    texts = {
        name.removeprefix("docs.jsonl#"): strings(record["texts"])
        for name, record in records.items()
    }
    assert texts == {
        "0": ["", "A.", "B."],
        "1": ["", "A.", "B."],
        "2": ["", "A. B."],
        "3": ["", "A."],
        "4": ["A.", "", "D. E."],
    }
    for name, numbers in (("0", [2, 1]), ("1", [2, 1]), ("2", [3]), ("3", [3]), ("4", [1, 2])):
        images = records[f"docs.jsonl#{name}"]["images"]
        assert all(
            (image == colourful(seed=number)).all()
            for image, number in zip(images, numbers, strict=True)
        )
    assert texts_dropped(tmp_path / "out") == {EMPTY: 1, NOT_UTF8: 1}


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_the_shards_of_open_flamingo(tmp_path: pathlib.Path, ending: str) -> None:
    """Its converter writes str() of the base64's bytes; others have mended that."""
    data = [save(tmp_path / f"{seed}.jpg", colourful(seed=seed), quality=95) for seed in (1, 2)]
    written = [str(base64.b64encode(data[0])), base64.b64encode(data[1]).decode()]
    info = [
        {"image_name": f"{place}.jpg", "matched_text_index": place, "image_base64": text}
        for place, text in enumerate(written)
    ]
    info.append({"image_name": "gone.jpg", "matched_text_index": 0})
    told = json.dumps(document(["A.", "B."], info)).encode("utf-8-sig")
    members = {"0f.json": told, "1a.json": b"[1", "2b.jpg": data[0]}
    path = tmp_path / "shards" / f"0.{ending}"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz" if ending.endswith("gz") else "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    dropped = {
        "line that is not JSON with sentences and images": 1,
        "sample without a .json": 1,
    }
    source = Mmc4((str(path.parent),), (), ALL_TRAIN)
    records = accounted(tmp_path / "out", source, dropped, {"missing": 1})
    (record,) = records.values()
    assert strings(record["texts"]) == ["", "A.", "B."]
    for image, jpeg in zip(record["images"], data, strict=True):
        assert (image == np.asarray(Image.open(io.BytesIO(jpeg)))).all()


def test_the_end_of_a_document_in_obelics_is_no_text(tmp_path: pathlib.Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    one, two = (save(tmp_path / f"{seed}.png", colourful(seed=seed)) for seed in (1, 2))
    images = [
        [{"bytes": one}, None, {"bytes": two}],
        [None, {"bytes": one}],
        [{"bytes": two}, None],
        [None],
    ]
    texts = [
        [None, f"first\n\n{END_OF_DOCUMENT}\n\nsecond", None],
        [END_OF_DOCUMENT, None],
        [None, f"x {END_OF_DOCUMENT} y"],
        [END_OF_DOCUMENT],
    ]
    parquet.write_table(arrow.table({"images": images, "texts": texts}), tmp_path / "a.parquet")
    dropped = {"page without an image that is fit": 2, "page without text": 1}
    lost = {"on a page without text": 1}
    records = accounted(tmp_path / "out", Obelics((str(tmp_path),), (), ALL_TRAIN), dropped, lost)
    assert {name: strings(record["texts"]) for name, record in records.items()} == {
        "a.parquet#0": ["", "first"],
        "a.parquet#0/1": ["second", ""],
        "a.parquet#2": ["", "x"],
    }


def test_a_label_that_is_none_is_not_the_last_class(tmp_path: pathlib.Path) -> None:
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(names=["cat", "dog"])

    def made(number: int, value: Any) -> dict[str, Any]:
        image = save(tmp_path / "image.png", colourful(seed=number))
        return {"image": io.BytesIO(image), "label": value}

    single = [made(number, value) for number, value in enumerate((0, -1, 1, -1))]
    name = prepare(tmp_path / "one", {"image": image, "label": label}, {"train": single})
    unknown = "label that is none of the classes"
    records = accounted(tmp_path / "out", Tfds(name, ALL_TRAIN), {unknown: 2})
    assert [strings(record["captions"]) for record in records.values()] == [["cat"], ["dog"]]
    several = [made(number, value) for number, value in enumerate(([0, -1], [-1], [1, 0]))]
    features = {"image": image, "label": tfds.features.Sequence(label)}
    source = Tfds(prepare(tmp_path / "two", features, {"train": several}), ALL_TRAIN)
    records = accounted(tmp_path / "more", source, {unknown: 1})
    assert [strings(record["captions"]) for record in records.values()] == [
        ["cat"],
        ["dog", "cat"],
    ]
    assert texts_dropped(tmp_path / "more") == {unknown: 2}
