"""Builders on small sources of their own: what is used, what is dropped and why, and in which
order it lands.
"""

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from rich.console import Console

from data_pipelines.build.html_pages import HtmlPages
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.plain_text import PlainText, documents
from data_pipelines.build.questions_folder import QuestionsFolder
from data_pipelines.build.sentencepiece_trainer import texts_in, train_tokenizer
from data_pipelines.build.source import SplitFractions
from data_pipelines.build.statistics_table import statistics_table
from data_pipelines.build.video_folder import VideoFolder
from data_pipelines.build.writer import ordered_map, write_dataset
from flamingo_jax.errors import UserError
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.video import read_video
from tests.data_pipelines.raw import (
    ALL_TRAIN,
    colourful,
    film,
    lines,
    read,
    save,
    strings,
)


def test_image_folder(tmp_path):
    root = tmp_path / "photos"
    kept = save(root / "deep" / "one.jpg", colourful())
    save(root / "two.webp", colourful(seed=9))
    save(root / "silent.png", colourful())
    save(root / "unlisted.png", colourful())
    save(tmp_path / "secret.png", colourful())
    (root / "torn.jpg").write_bytes(kept[:200])
    lines(
        root / "captions.jsonl",
        {"image": "deep/one.jpg", "captions": [" a cat ", "two"]},
        {"image": "two.webp", "caption": "ein Hund"},
        {"image": "deep/one.jpg", "caption": "three"},
        {"image": "gone.jpg", "caption": "x"},
        {"image": "../secret.png", "caption": "x"},
        {"image": "torn.jpg", "caption": "x"},
        {"image": "silent.png", "captions": []},
        "not JSON",
        '["a list"]',
        {"image": 3, "caption": "x"},
        {"image": "x.jpg", "captions": [1]},
        {"image": "two.webp", "caption": "half of an emoji: \ud83d"},
        "",
    )
    statistics, _ = write_dataset(tmp_path / "out", ImageFolder((str(root),), ALL_TRAIN))
    assert (
        statistics["splits"] == {"train": 2} and statistics["records_read"] == 2 + 1 + 1 + 1 + 2 + 5
    )
    assert statistics["dropped"] == {
        "caption line that is not JSON with a name and captions": 4,
        "missing": 1,
        "no caption": 2,
        "outside the folder": 1,
        "text that is not UTF-8": 1,
        "unreadable": 1,
    }
    records = read(tmp_path / "out")
    assert strings(records["deep/one.jpg"]["captions"]) == ["a cat", "two", "three"]
    assert strings(records["two.webp"]["captions"]) == ["ein Hund"]
    assert records["two.webp"]["image"].shape == (80, 100, 3)


def test_links_do_not_lead_out_of_the_folder(tmp_path):
    save(tmp_path / "secret.png", colourful())
    (tmp_path / "photos").mkdir()
    os.symlink(tmp_path / "secret.png", tmp_path / "photos" / "link.png")
    lines(tmp_path / "photos" / "captions.jsonl", {"image": "link.png", "caption": "x"})
    with pytest.raises(UserError, match="1 link that leads outside the folder"):
        write_dataset(tmp_path / "out", ImageFolder((str(tmp_path / "photos"),), ALL_TRAIN))


def test_an_image_is_one_record_however_its_name_is_written(tmp_path):
    root = tmp_path / "photos"
    save(root / "a.png", colourful())
    save(root / "b.png", colourful(seed=9))
    os.symlink(root, tmp_path / "link")
    names = [
        "a.png",
        "./a.png",
        "nowhere/../a.png",
        str(root / "a.png"),
        str(tmp_path / "link" / "b.png"),
    ]
    captions = "".join(
        json.dumps({"image": name, "caption": str(number)}) + "\n"
        for number, name in enumerate(names)
    )
    (root / "captions.jsonl").write_text(captions, encoding="utf-8-sig")
    statistics, _ = write_dataset(tmp_path / "out", ImageFolder((str(root),), ALL_TRAIN))
    assert statistics["dropped"] == {}
    assert {
        name: strings(record["captions"]) for name, record in read(tmp_path / "out").items()
    } == {"a.png": ["0", "1", "2", "3"], "b.png": ["4"]}


def test_names_that_no_file_can_have_are_missing(tmp_path):
    root = tmp_path / "photos"
    save(root / "a.png", colourful())
    os.symlink("circle.png", root / "circle.png")
    names = ["x" * 300 + ".png", "a\0.png", "\ud83d.png", "circle.png"]
    lines(
        root / "captions.jsonl",
        *({"image": name, "caption": "x"} for name in ["a.png", *names]),
    )
    statistics, _ = write_dataset(tmp_path / "out", ImageFolder((str(root),), ALL_TRAIN))
    assert statistics["used"] == 1 and statistics["dropped"] == {"missing": 4}
    (root / "page.html").write_text(
        f'<p>one<img src="a.png">two<img src="thumb.php?sig={"x" * 300}"><img src="circle.png">'
    )
    statistics, _ = write_dataset(tmp_path / "pages", HtmlPages((str(root),), ALL_TRAIN))
    assert statistics["images"] == {"used": 1, "dropped": {"missing": 2}}


@pytest.mark.parametrize(
    "source, ending", [(ImageFolder, ".png"), (HtmlPages, ".html"), (PlainText, ".txt#0")]
)
def test_file_names_that_are_not_unicode_give_ids(tmp_path, source, ending):
    root, name = tmp_path / "files", os.fsdecode(b"caf\xe9")
    save(root / f"{name}.png", colourful())
    save(root / "a.png", colourful())
    lines(root / "captions.jsonl", {"image": f"{name}.png", "caption": "x"})
    (root / f"{name}.html").write_text('<p>one<img src="a.png">two')
    (root / f"{name}.txt").write_text("text")
    write_dataset(tmp_path / "out", source((str(root),), ALL_TRAIN))
    assert set(read(tmp_path / "out")) == {"caf\\udce9" + ending}


def test_several_folders_make_one_dataset_and_splits_cover_it(tmp_path):
    for folder in ("one", "two"):
        for number in range(20):
            save(tmp_path / folder / f"{number}.png", colourful(8, 8, seed=number))
        lines(
            tmp_path / folder / "captions.jsonl",
            *({"image": f"{number}.png", "caption": str(number)} for number in range(20)),
        )
    source = ImageFolder(
        (str(tmp_path / "one"), str(tmp_path / "two")), SplitFractions(validation=0.3, test=0.3)
    )
    with ThreadPoolExecutor(2) as executor:
        statistics, _ = write_dataset(tmp_path / "out", source, executor)
    ids = [read(tmp_path / "out", split).keys() for split in ("train", "validation", "test")]
    expected = [f"{folder}/{number}.png" for folder in ("one", "two") for number in range(20)]
    assert sorted(name for split in ids for name in split) == sorted(expected)
    assert statistics["splits"] == dict(
        zip(("train", "validation", "test"), map(len, ids), strict=True)
    )


def test_caption_file_of_another_name(tmp_path):
    save(tmp_path / "photos" / "a.png", colourful())
    lines(tmp_path / "photos" / "notes.jsonl", {"image": "a.png", "caption": "x"})
    with pytest.raises(UserError, match=r"no captions.jsonl.*--captions"):
        write_dataset(tmp_path / "out", ImageFolder((str(tmp_path / "photos"),)))
    with pytest.raises(UserError, match=r'no captions.jsonl or videos.jsonl.*\{"video": '):
        write_dataset(tmp_path / "out", VideoFolder((str(tmp_path / "photos"),)))
    write_dataset(
        tmp_path / "out", ImageFolder((str(tmp_path / "photos"),), ALL_TRAIN, "notes.jsonl")
    )
    assert set(read(tmp_path / "out")) == {"a.png"}


def test_video_folder(tmp_path):
    root = tmp_path / "clips"
    film(root / "a.mp4", 4)
    film(root / "long.avi", 5, size=(128, 192))
    film(root / "alone.mp4", 1)
    (root / "torn.mp4").write_bytes(b"no film")
    lines(
        root / "videos.jsonl",
        {"video": "a.mp4", "captions": ["brighter", "and brighter"]},
        {"video": "long.avi", "caption": "long"},
        {"video": "torn.mp4", "caption": "x"},
    )
    statistics, _ = write_dataset(
        tmp_path / "out", VideoFolder((str(root),), ALL_TRAIN, max_seconds=3, short_side=32)
    )
    assert statistics["dropped"] == {"no caption": 1, "unreadable": 1}
    records = read(tmp_path / "out")
    assert set(records) == {"a.mp4", "long.avi"}
    assert (
        strings(records["a.mp4"]["captions"]) == ["brighter", "and brighter"]
        and records["a.mp4"]["fps"] == 1.0
    )
    for record in records.values():
        assert [frame.shape for frame in record["frames"]] == [(32, 48, 3)] * 3
        assert [float(frame.mean()) for frame in record["frames"]] == pytest.approx(
            [20, 60, 100], abs=4
        )


def test_video_frames_shrink_as_they_are_read(tmp_path, monkeypatch):
    film(tmp_path / "clips" / "a.mp4", 3)
    lines(tmp_path / "clips" / "captions.jsonl", {"video": "a.mp4", "caption": "x"})
    shapes = []

    def reading(*args, **options):
        read = read_video(*args, **options)
        shapes.extend(frame.shape for frame in read.frames)
        return read

    monkeypatch.setattr("data_pipelines.build.video_folder.read_video", reading)
    write_dataset(
        tmp_path / "out", VideoFolder((str(tmp_path / "clips"),), ALL_TRAIN, short_side=32)
    )
    assert shapes == [(32, 48, 3)] * 3


def test_questions_folder(tmp_path):
    root = tmp_path / "asked"
    save(root / "pics" / "a.png", colourful())
    save(root / "silent.png", colourful())
    film(root / "b.mp4", 3)
    lines(
        root / "qa.jsonl",
        {"image": "pics/a.png", "question": " what? ", "answer": "a slope"},
        {"image": "gone.png", "question": "x?", "answer": "x"},
        {
            "video": "b.mp4",
            "question": "brighter?",
            "answers": ["yes", "yes", "no"],
            "type": "motion",
        },
        {"image": "./pics/a.png", "question": "how many?", "answer": 2},
        {"image": "pics/a.png", "question": "nothing?", "answers": []},
        {"image": "pics/a.png", "question": "a list?", "answers": [2]},
        {"image": "pics/a.png", "answer": "no question"},
        "[1]",
        "3",
        "null",
        {"video": "pics/../../out.mp4", "question": "x?", "answer": "x"},
        {"image": "pics/a.png", "question": "half: \ud83d", "answer": "x"},
    )
    statistics, _ = write_dataset(
        tmp_path / "out", QuestionsFolder((str(root),), ALL_TRAIN, fps=2.0, video_short_side=32)
    )
    assert (
        statistics["splits"] == {"train": 3}
        and statistics["records_read"] == 3 + 1 + 1 + 1 + 5 + 1 + 1
    )
    assert statistics["dropped"] == {
        "line that is not JSON with an image, a question and answers": 5,
        "missing": 1,
        "no answer": 1,
        "no question": 1,
        "outside the folder": 1,
        "text that is not UTF-8": 1,
    }
    records = read(tmp_path / "out")
    told = {
        name: (record["question"].decode(), strings(record["answers"]), record["type"].decode())
        for name, record in records.items()
    }
    assert told == {
        "pics/a.png#0": ("what?", ["a slope"], ""),
        "pics/a.png#1": ("how many?", ["2"], ""),
        "b.mp4#0": ("brighter?", ["yes", "yes", "no"], "motion"),
    }
    assert [frame.shape for frame in records["b.mp4#0"]["frames"]] == [(32, 48, 3)] * 6
    assert all(
        (record["frames"][0] == colourful()).all()
        for name, record in records.items()
        if "png" in name
    )


def test_all_questions_about_an_image_are_in_one_split(tmp_path):
    names = [f"{number}.png" for number in range(30)]
    for name in names:
        save(tmp_path / "asked" / name, colourful(8, 8))
    lines(
        tmp_path / "asked" / "questions.jsonl",
        *(
            {"image": name, "question": str(turn), "answer": "x"}
            for turn in range(4)
            for name in names
        ),
    )
    statistics, _ = write_dataset(
        tmp_path / "out",
        QuestionsFolder((str(tmp_path / "asked"),), SplitFractions(validation=0.3)),
    )
    about = {
        split: {name.split("#")[0] for name in read(tmp_path / "out", split)}
        for split in ("train", "validation")
    }
    assert about["train"].isdisjoint(about["validation"]) and about["train"] | about[
        "validation"
    ] == set(names)
    assert statistics["splits"] == {split: 4 * len(found) for split, found in about.items()}


def test_plain_text(tmp_path):
    (tmp_path / "books" / "deep").mkdir(parents=True)
    (tmp_path / "books" / "one.txt").write_bytes(
        "\ufeffFirst line\r\nsecond\r\n\r\n\r\n  third\n\nfourth".encode()
    )
    (tmp_path / "books" / "deep" / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "books" / "empty.txt").write_text(" \n\n")
    statistics, _ = write_dataset(
        tmp_path / "out",
        PlainText((str(tmp_path / "books"),), ALL_TRAIN, document_characters=26),
    )
    assert statistics["dropped"] == {"empty": 1, "not UTF-8": 1} and statistics["splits"] == {
        "train": 2
    }
    assert [record["text"].decode() for record in read(tmp_path / "out").values()] == [
        "First line\nsecond\n\n  third",
        "fourth",
    ]
    with pytest.raises(UserError, match=r"no \.txt file"):
        write_dataset(tmp_path / "none", PlainText((str(tmp_path / "out"),)))


@pytest.mark.parametrize("limit", [3, 10, 40, 1_000])
def test_documents_keep_every_word_within_the_limit(limit):
    rng = np.random.default_rng(0)
    words = ["ab" * int(n) for n in rng.integers(1, 12, 300)]
    breaks = [" ", "\n", "\n\n", "\n \n\n"]
    text = "".join(word + breaks[int(rng.integers(4))] for word in words)
    made = list(documents(text, limit))
    assert all(0 < len(document) <= limit for document in made)
    assert "".join("".join(made).split()) == "".join(words)
    if limit == 1_000:
        assert len(made) <= 2 * len(text) / limit


def test_a_long_paragraph_is_cut_in_time_that_grows_with_its_length() -> None:
    words = [f"word{number}" for number in range(400_000)]
    made = list(documents(" ".join(words), 100))  # 44,000 copies of the rest would take a minute.
    assert " ".join(made).split(" ") == words and max(map(len, made)) <= 100


def test_tokenizer_keeps_any_text(tmp_path):
    (tmp_path / "a.txt").write_text(
        "the cat sat on the mat\n" * 50 + "a dog and a log <image> in a fog\n" * 50
    )
    file = train_tokenizer(texts_in(tmp_path), tmp_path / "tokenizer", vocab_size=312)
    tokenizer = Tokenizer.load(file.parent)
    assert (
        tokenizer.vocab_size == 312
        and len(tokenizer.image_tag_ids) == 1
        and (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 3)
    )
    for text in (" the  cat", "the cat", "Ünknown \t 漢字\n\nline ", "<image>the mat"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("the cat") != tokenizer.encode(" the cat")
    again = train_tokenizer(texts_in(tmp_path / "a.txt"), tmp_path / "again", vocab_size=312)
    assert again.read_bytes() == file.read_bytes()


def test_tokenizer_errors(tmp_path):
    (tmp_path / "a.txt").write_text("few words\n")
    with pytest.raises(
        UserError,
        match=(
            r"^this text gives (\d+) pieces at most: choose a --vocab_size of \1 or less, not"
            r" 5000$"
        ),
    ):
        train_tokenizer(texts_in(tmp_path), tmp_path / "t", vocab_size=5_000)
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", " \n"], tmp_path / "t")
    with pytest.raises(UserError, match="no dataset, no text file"):
        list(texts_in(tmp_path / "nowhere"))


def test_missing_folders_are_named(tmp_path):
    for source in (ImageFolder, VideoFolder, HtmlPages, PlainText):
        with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
            write_dataset(tmp_path / "out", source((str(tmp_path / "nowhere"),)))
    assert not (tmp_path / "out").exists()


def test_command(tmp_path):
    save(tmp_path / "site" / "a.png", colourful())
    (tmp_path / "site" / "page.html").write_text('<p>one<img src="a.png">two<img src="gone.png">')

    def build(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.build_data", "--workers=1", *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    flags = (
        "--source=html_pages",
        f"--input={tmp_path}/site",
        f"--output={tmp_path}/data/site",
        "--validation_share=0",
    )
    first = build(*flags)
    assert first.returncode == 0, first.stderr
    assert (
        "1 train" in first.stdout
        and "1 missing" in first.stdout
        and "was there" not in first.stdout
    )
    assert set(read(tmp_path / "data" / "site")) == {"page.html"}
    statistics = json.loads((tmp_path / "data" / "site" / "1.0.0" / "statistics.json").read_text())
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(statistics_table({"site": (statistics, False)}))
    assert "site (was there)" in console.export_text()
    wrong = build(flags[0], "--input=nowhere", f"--output={tmp_path}/data/other")
    assert (
        wrong.returncode == 2
        and wrong.stderr == "error: there is no folder nowhere: mend --input\n"
    )


def test_work_is_ordered_and_bounded():
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return number * number

    with ThreadPoolExecutor(2) as executor:
        results = ordered_map(work, range(2_000), executor)
        assert [next(results) for _ in range(10)] == [number * number for number in range(10)]
        assert len(begun) < 400
        assert list(results) == [number * number for number in range(10, 2_000)]
