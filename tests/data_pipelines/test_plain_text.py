"""Plain text and the tokenizer: every line is used or counted, and no split knows another's."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from data_pipelines.build.plain_text import (
    BORDER,
    NULLS,
    PlainText,
    documents,
    splits_by_rank,
    stretches,
)
from data_pipelines.build.sentencepiece_trainer import (
    MAX_SENTENCE,
    cut,
    texts_in,
    train_tokenizer,
)
from data_pipelines.build.source import SplitFractions, SplitRecord
from data_pipelines.build.writer import write_dataset
from flamingo_jax.errors import UserError
from flamingo_jax.processing.tokenizer import Tokenizer
from tests.data_pipelines.raw import ALL_TRAIN, accounted, read


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
    source = PlainText((str(root),), SplitFractions(0.1, 0.05), document_characters=100)
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
    statistics, _ = write_dataset(
        tmp_path / "out", PlainText((str(root),), SplitFractions(0.2), 100)
    )
    names = {
        split: {name.split("#")[0] for name in read(tmp_path / "out", split)}
        for split in ("train", "validation")
    }
    assert names["train"].isdisjoint(names["validation"]) and statistics["dropped"] == {}
    assert statistics["used"] == 1800 and 4 <= len(names["validation"]) <= 24


def test_a_few_short_files_leave_one_for_each_split(tmp_path: pathlib.Path) -> None:
    for start in range(12):
        root = tmp_path / f"notes{start}"
        root.mkdir()
        for number in range(start, start + 4):
            (root / f"{number}.txt").write_text("\n\n".join("x" * 90 for _ in range(3)))
        source = PlainText((str(root),), document_characters=100)
        outcomes = [outcome for entry in source.entries() for outcome in source.convert(entry)]
        assert len(outcomes) == 12
        splits = {
            outcome.fields["id"]: outcome.split
            for outcome in outcomes
            if isinstance(outcome, SplitRecord)
        }
        assert list(splits.values()).count("validation") == 3
        assert len({name[0] for name, split in splits.items() if split == "validation"}) == 1


def test_a_rank_gives_each_split_its_share_and_at_least_one() -> None:
    for validation, test in itertools.product((0.0, 0.1, 0.3, 0.45), repeat=2):
        shares = SplitFractions(validation, test)
        for count in range(1, 40):
            ids = [f"{number}.txt" for number in range(count)]
            found = splits_by_rank(ids, shares)
            assert set(found) == set(ids) and "train" in found.values()
            splits = list(found.values())
            assert len(set(splits)) == min(count, len(shares.wanted()))
            for split, share in (("validation", validation), ("test", test)):
                assert splits.count(split) <= max(1, round(share * count))
                if count >= 10:
                    assert splits.count(split) == max(share > 0, round(share * count))
    assert splits_by_rank(["a", "b"], SplitFractions.whole("test")) == {"a": "test", "b": "test"}
    assert splits_by_rank([], SplitFractions()) == {}


@pytest.mark.parametrize(
    "shares",
    [
        SplitFractions(0.1),
        SplitFractions(0.25, 0.25),
        SplitFractions(0, 0.5),
        SplitFractions(0.5, 0.5),
        SplitFractions.whole("test"),
    ],
)
def test_stretches_part_the_splits(shares: SplitFractions) -> None:
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
