"""Lengths that are kept beside a dataset, where storage fails or records are damaged or mended."""

import dataclasses
import errno
import os
import pathlib

import numpy as np
import pytest

from data_pipelines.records import UNREADABLE, open_records
from data_pipelines.transforms.lengths import load_or_measure
from flamingo_jax import storage
from flamingo_jax.errors import UserError
from tests.data_pipelines.faults import (
    build,
    hurt,
)
from tests.data_pipelines.test_storage import COUNT, iterator
from tests.data_pipelines.toy_data import same, take


def test_side_files_are_read_again_too(tokenizer, tmp_path, monkeypatch):
    """The description of a dataset, and what lengths were measured, by their own readers."""
    folder = build(tmp_path, "text", COUNT, monkeypatch)
    monkeypatch.setattr(storage, "WAITS", (0.001, 0.002))
    whole = take(iterator(folder, "text", tokenizer), 3)
    (lengths,) = folder.glob("lengths_*")
    stamp = lengths.stat().st_mtime_ns
    met = []

    def failing(real, wanted):
        def call(path, *args, **options):
            if str(path).endswith(wanted) and met.count(wanted) < 2:
                met.append(wanted)
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            return real(path, *args, **options)

        return call

    monkeypatch.setattr(np, "load", failing(np.load, ".npz"))
    monkeypatch.setattr(pathlib.Path, "stat", failing(pathlib.Path.stat, ".npz_"))
    import tensorflow_datasets as tfds

    monkeypatch.setattr(
        tfds, "builder_from_directory", failing(tfds.builder_from_directory, "1.0.0")
    )
    for first, second in zip(whole, take(iterator(folder, "text", tokenizer), 3), strict=True):
        same(first, second)
    assert met.count(".npz") == 2 and met.count("1.0.0") == 2
    assert lengths.stat().st_mtime_ns == stamp, (
        "what is kept is not measured again for a moment's failure"
    )


def blank_lengths(path: pathlib.Path, place: int, *, damaged: bool | None) -> None:
    """Lengths that hold a blank one's for a record, as versions before kept them, which did not
    note what was damaged.
    """
    with np.load(path) as stored:
        values = dict(stored)
    values["tokens"][place] = 2
    if damaged is None:
        del values["damaged"]
    else:
        values["damaged"][place] = damaged
    np.savez(path, **values)


@pytest.mark.parametrize("kind", ["text", "pages", "questions"])
def test_lengths_that_were_kept_under_an_error_are_measured_again(
    kind,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    folder = build(tmp_path, kind, COUNT, monkeypatch)
    task = "language_modelling" if kind in ("text", "questions") else "flamingo"
    whole = take(iterator(folder, kind, tokenizer, task), 12)
    (lengths,) = folder.glob("lengths_*")
    for damaged in (None, True):
        blank_lengths(lengths, 3, damaged=damaged)
        for first, second in zip(
            whole, take(iterator(folder, kind, tokenizer, task), 12), strict=True
        ):
            same(first, second)


@pytest.mark.parametrize("kind", ["text", "pages", "questions"])
def test_lengths_that_no_longer_agree_are_named_in_a_sentence(
    kind,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    folder = build(tmp_path, kind, COUNT, monkeypatch)
    task = "language_modelling" if kind in ("text", "questions") else "flamingo"
    it = iterator(folder, kind, tokenizer, task)
    rows = it.summary()["rows"]
    it.close()
    (lengths,) = folder.glob("lengths_*")
    blank_lengths(lengths, 3, damaged=False)
    it = iterator(folder, kind, tokenizer, task)
    with pytest.raises(
        UserError,
        match=(
            rf"the record '{kind}\d+' of .* has \d+ tokens, where 2 were measured: .* remove"
            r" the files lengths_"
        ),
    ) as caught:
        for _ in range(rows):
            next(it)
    assert caught.value.exit_code == 2, "no launcher starts it again"


def test_a_caption_that_was_measured_and_is_gone_is_a_sentence(tokenizer, tmp_path, monkeypatch):
    folder = build(tmp_path, "pairs", COUNT, monkeypatch)
    iterator(folder, "pairs", tokenizer).close()
    (path,) = folder.glob("lengths_*")
    with np.load(path) as stored:
        values = dict(stored)
    # Every record but the last has the captions of the one behind it too.
    values["first"] = np.concatenate(
        [values["first"][:1], values["first"][2:], values["first"][-1:]]
    )
    np.savez(path, **values)
    it = iterator(folder, "pairs", tokenizer)
    with pytest.raises(UserError, match="were measured|no caption 2, which was measured"):
        for _ in range(40):
            next(it)


@pytest.mark.parametrize(
    "hurt_file",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-300] + bytes(300),
        lambda data: b"PK" + data,
    ],
)
def test_lengths_whose_file_is_damaged_are_measured_again(
    hurt_file,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    folder = build(tmp_path, "text", COUNT, monkeypatch)
    records = open_records(folder, "train", "text")
    made = load_or_measure(records, "text", tokenizer, folder, "train")
    (path,) = folder.glob("lengths_*")
    whole = path.read_bytes()
    path.write_bytes(hurt_file(whole))
    again = load_or_measure(records, "text", tokenizer, folder, "train")
    for field in dataclasses.fields(made):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(made, field.name))
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored["tokens"], made.tokens)


def test_a_record_that_was_mended_is_whole_again(tokenizer, tmp_path, monkeypatch):
    """The damage that was measured is kept for as long as it lasts."""
    folder = build(tmp_path, "pairs", COUNT, monkeypatch)
    whole = take(iterator(folder, "pairs", tokenizer), 12)
    (lengths,) = folder.glob("lengths_*")
    lengths.unlink()
    place, mend = hurt(folder, "pairs")
    records = open_records(folder, "train", "pairs")
    it = iterator(folder, "pairs", tokenizer)
    for _ in range(it.summary()["rows"] // 4 + 1):
        next(it)
    assert it.summary()["failed"] == [f"#{place}"]
    it.close()
    made = lengths.read_bytes()
    assert load_or_measure(records, "pairs", tokenizer, folder, "train").damaged.nonzero()[
        0
    ].tolist() == [place]
    assert lengths.read_bytes() == made, "what is damaged still is not measured at every start"
    mend()
    for first, second in zip(
        whole, take(it := iterator(folder, "pairs", tokenizer), 12), strict=True
    ):
        same(first, second)
    assert it.summary()["failed"] == []


@pytest.mark.parametrize("kind", ["pairs", "pages", "text", "videos"])
def test_damage_that_comes_after_lengths_were_measured_is_masked(
    kind,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    """Before the start, and in the midst of a run; all else stays as it was, and a caption that
    the blank in its place lacks is not asked for.
    """
    folder = build(tmp_path, kind, COUNT, monkeypatch)
    it = iterator(folder, kind, tokenizer)
    epoch = 3 * (it.summary()["rows"] // 4 + 1)
    whole = take(it, epoch)
    running = iterator(folder, kind, tokenizer)
    for _ in range(epoch):
        next(running)
    running.set_state({"global_next_index": 0})
    place, _ = hurt(folder, kind)
    for it, known in (
        (iterator(folder, kind, tokenizer), False),
        (running, kind in ("pages", "text")),
    ):
        lost = 0
        for before in whole:
            after = next(it)
            hit = before["loss_mask"] & ~after["loss_mask"]
            lost += hit.sum()
            rows = ~hit.any(1)
            np.testing.assert_array_equal(before["tokens"][rows], after["tokens"][rows])
            np.testing.assert_array_equal(before["segments"], after["segments"])
            assert not (after["loss_mask"] & ~before["loss_mask"]).any()
        # What was made of texts stays in memory, so that of a page the images alone are lost.
        assert bool(lost == 0) is known and len(it.summary()["failed"]) == (
            0 if known and kind == "text" else 1
        )
        it.close()


def test_a_damaged_question_is_not_told(tokenizer, tmp_path, monkeypatch):
    """In the contrastive stage several are told about one image; the blank that stands in for
    one is none of them.
    """
    folder = build(tmp_path, "questions", COUNT, monkeypatch)
    it = iterator(folder, "questions", tokenizer, text_length=60)
    whole = take(it, 10)
    # Each third one is the first about its image.
    ids = [
        int(open_records(folder, "train", "questions")[place]["id"][9:]) for place in range(COUNT)
    ]
    place, _ = hurt(folder, "questions", lambda place: ids[place] % 3 > 0)
    source = open_records(folder, "train", "questions")
    left = len(source) - 1
    assert sum(UNREADABLE not in source[number] for number in range(len(source))) == left
    it = iterator(folder, "questions", tokenizer, text_length=60)
    fewer = 0
    for before in whole:
        after = next(it)
        gone = before["mask"].sum(1) - after["mask"].sum(1)
        assert (gone >= 0).all() and after["mask"].any(1).all()
        fewer += (gone > 0).sum()
    assert fewer > 0 and it.summary()["failed"] == [f"#{place}"]
    it.close()
