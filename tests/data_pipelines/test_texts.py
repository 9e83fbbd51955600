"""Texts as people's files hold them: every record is used, or counted for a reason that is true."""

import base64
import io
import itertools
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
from data_pipelines.build.plain_text import BORDER, NULLS, PlainText, documents, stretches
from data_pipelines.build.questions_folder import QuestionsFolder
from data_pipelines.build.sentencepiece_trainer import MAX_SENTENCE, cut, texts_in, train_tokenizer
from data_pipelines.build.source import Shares, Source
from data_pipelines.build.text_files import TooLong, decode, json_lines, text_lines
from data_pipelines.build.tfds import Tfds
from data_pipelines.build.webdataset import WebDataset
from data_pipelines.build.writer import write_dataset
from flamingo_jax.errors import UserError
from flamingo_jax.processing.tokenizer import Tokenizer
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
        assert not isinstance(text, TooLong)
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
        {"question": "no picture?", "answer": "x"},
    )
    bad_line = "line that is not JSON with a picture, a question and answers"
    dropped = {bad_line: 2, "no answer": 1, "no question": 2}
    records = accounted(tmp_path / "out", QuestionsFolder((str(root),), ALL_TRAIN), dropped)
    told = {
        r["question"].decode(): (strings(r["answers"]), r["type"].decode())
        for r in records.values()
    }
    assert told == {"vqa?": (["yes", "no"], "3"), "table?": (["x"], ""), "number?": (["2.5"], "")}
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
    dropped = {"line that is not JSON with sentences and pictures": 2}
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
        "line that is not JSON with sentences and pictures": 1,
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
    dropped = {"page without a picture that is fit": 2, "page without text": 1}
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
        picture = save(tmp_path / "picture.png", colourful(seed=number))
        return {"image": io.BytesIO(picture), "label": value}

    single = [made(number, value) for number, value in enumerate((0, -1, 1, -1))]
    name = prepare(tmp_path / "one", {"image": image, "label": label}, {"train": single})
    unknown = "label that is none of the classes"
    records = accounted(tmp_path / "out", Tfds(name, ALL_TRAIN), {unknown: 2})
    assert [strings(record["captions"]) for record in records.values()] == [["cat"], ["dog"]]
    several = [made(number, value) for number, value in enumerate(([0, -1], [-1], [1, 0]))]
    features = {"image": image, "label": tfds.features.Sequence(label)}
    source = Tfds(prepare(tmp_path / "two", features, {"train": several}), ALL_TRAIN)
    records = accounted(tmp_path / "more", source, {unknown: 1})
    assert [strings(record["captions"]) for record in records.values()] == [["cat"], ["dog", "cat"]]
    assert texts_dropped(tmp_path / "more") == {unknown: 2}


# Plain text and the tokenizer.


def test_plain_text_of_all_sorts(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    (root / "UPPER.TXT").write_text("upper")
    (root / "wide.txt").write_bytes("wide\r\n\r\nand more".encode("utf-16"))
    (root / "separated.txt").write_text("one\u2028line")
    (root / "bare.txt").write_bytes("no mark".encode("utf-16-le"))
    (root / "torn.txt").write_bytes("torn".encode("utf-16") + b"\0")
    (root / "latin.txt").write_bytes("é".encode("latin-1"))
    (root / "blank.txt").write_text(" \n\n\t")
    dropped = {NULLS: 1, "not UTF-8": 2, "empty": 1}
    records = accounted(tmp_path / "out", PlainText((str(root),), ALL_TRAIN), dropped)
    assert {name: record["text"].decode() for name, record in records.items()} == {
        "UPPER.TXT#0": "upper",
        "wide.txt#0": "wide\n\nand more",
        "separated.txt#0": "one\u2028line",
    }


def test_neighbours_in_a_book_are_not_both_learned_and_held_out(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "books"
    root.mkdir()
    for book in range(3):
        (root / f"{book}.txt").write_text(
            "\n\n".join(f"{book} {part} " + "x" * 90 for part in range(200))
        )
    (root / "note.txt").write_text("short")
    source = PlainText((str(root),), Shares(0.1, 0.05), document_characters=100)
    statistics, _ = write_dataset(tmp_path / "out", source)
    split_of = {
        tuple(map(int, name.removesuffix("").split(".txt#"))): split
        for split in statistics["splits"]
        for name in read(tmp_path / "out", split)
        if name[0].isdigit()
    }
    for (book, part), split in split_of.items():
        assert split_of.get((book, part + 1), split) == split
    for book in range(3):
        counts = {
            split: sum(key[0] == book and s == split for key, s in split_of.items())
            for split in statistics["splits"]
        }
        assert (counts["validation"], counts["test"]) == (20, 10) and 167 <= counts["train"] <= 168
    borders = statistics["dropped"].pop(BORDER)
    assert 3 * 2 <= borders <= 3 * 3 and not statistics["dropped"]
    assert statistics["records_read"] == statistics["used"] + borders == 601


def test_many_files_are_dealt_as_wholes(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "notes"
    root.mkdir()
    for number in range(60):
        (root / f"{number}.txt").write_text("\n\n".join("x" * 90 for _ in range(30)))
    statistics, _ = write_dataset(tmp_path / "out", PlainText((str(root),), Shares(0.2), 100))
    names = {
        split: {name.split("#")[0] for name in read(tmp_path / "out", split)}
        for split in ("train", "validation")
    }
    assert names["train"].isdisjoint(names["validation"]) and statistics["dropped"] == {}
    assert statistics["used"] == 1800 and 4 <= len(names["validation"]) <= 24


@pytest.mark.parametrize(
    "shares",
    [Shares(0.1), Shares(0.25, 0.25), Shares(0, 0.5), Shares(0.5, 0.5), Shares.whole("test")],
)
def test_stretches_part_the_splits(shares: Shares) -> None:
    for count in (0, 1, 2, 3, 7, 40, 301):
        for key in map(str, range(20)):
            splits = stretches(count, shares, key)
            if splits is None:
                assert count < 12
                continue
            known = [split for split in splits if split]
            assert len(splits) == count and set(known) == set(shares.wanted())
            assert all(
                here == after or None in (here, after) for here, after in itertools.pairwise(splits)
            )
            assert splits.count(None) <= 3


@pytest.mark.parametrize("size", [3, 7, 50])
def test_long_lines_are_cut_at_spaces_and_lose_nothing(size: int) -> None:
    rng = np.random.default_rng(0)
    text = " ".join("aé漢🎈"[n % 4] * (n // 4) for n in rng.integers(0, 40, 200).tolist())
    size += 1  # Four bytes are the least that holds any character.
    parts = list(cut(text, size))
    assert "".join(parts) == text and all(0 < len(part.encode()) <= size for part in parts)
    words = set(text.split())
    fitting = {word for word in words if len(word.encode()) < size}
    assert fitting <= set(" ".join(parts).split())


def test_the_tokenizer_learns_from_every_line(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "books"
    root.mkdir()
    (root / "A.TXT").write_bytes(("zebra quagga " * (MAX_SENTENCE // 10)).encode("utf-16"))
    (root / "b.txt").write_bytes(b"okapi \xff\n" + "okapi ▅ giraffe\n\0\n\n".encode())
    file = train_tokenizer(texts_in(root), tmp_path / "out", vocab_size=296)
    statistics = json.loads((file.parent / "statistics.json").read_text())
    assert statistics == {
        "records_read": 4,
        "used": 2,
        "cut": 2,
        "dropped": {"text that is not UTF-8": 1, "null characters or U+2585 alone": 1},
    }
    tokenizer = Tokenizer.load(file.parent)
    assert (
        len(tokenizer.encode(" quagga zebra")) == 2
        and tokenizer.decode(tokenizer.encode("▅ x")) == "▅ x"
    )


def test_a_text_that_is_not_read_stops_the_training(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "books"
    root.mkdir()
    (root / "a.txt").write_text("a book")
    (tmp_path / "elsewhere.txt").write_text("not given")
    (root / "b.txt").symlink_to(tmp_path / "elsewhere.txt")
    with pytest.raises(UserError, match=r"b.txt is not read \(link that leads outside"):
        list(texts_in(root))
    (root / "b.txt").unlink()
    assert list(texts_in(root)) == ["a book"]


def test_a_text_that_gives_no_tokenizer_says_why(tmp_path: pathlib.Path) -> None:
    for texts, sentence in (
        (["▅", "\0"], r"no text to train a tokenizer on \(2 lines: null characters"),
        (["\ud800"], r"no text to train a tokenizer on \(1 lines: text that is not UTF-8"),
        (["漢字"], "more characters than --vocab_size=100 holds: choose one above"),
    ):
        with pytest.raises(UserError, match=sentence):
            train_tokenizer(texts, tmp_path / "out", vocab_size=100)
    assert not (tmp_path / "out").exists()


def test_documents_hold_what_stands_between_blank_lines() -> None:
    assert list(documents("a\n\n\nb\n \nc", 3)) == ["a", "b", "c"]
