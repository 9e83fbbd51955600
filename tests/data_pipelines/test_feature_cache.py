"""Features in the images' place: each image's own, made once, whatever is torn, rebuilt or
unreadable.
"""

import dataclasses
import errno
import io
import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from data_pipelines import feature_cache, open_files
from data_pipelines.batches import make_held_out, make_iterator
from data_pipelines.build.source import SplitRecord
from data_pipelines.build.writer import write_dataset
from data_pipelines.features import INFO_FILE
from data_pipelines.open_files import OpenFiles
from data_pipelines.records import open_records
from flamingo_jax.errors import StorageError, UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.processing.images import ImageError
from flamingo_jax.processing.tokenizer import Tokenizer
from tests.data_pipelines.faults import Faults, build, ever, hurt, now_and_then
from tests.data_pipelines.test_features import Given

SIZE = 8
MEAN = (0.5, 0.5, 0.5)


@dataclasses.dataclass
class Quarters:
    """An encoder whose features are the mean colours of an image's four quarters."""

    digest: str = "quarters"
    shape: tuple[int, int] = (4, 3)
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))
    calls: int = 0

    @property
    def encode(self) -> Callable[[np.ndarray], np.ndarray]:
        def encode(images: np.ndarray) -> np.ndarray:
            self.calls += 1
            assert images.shape[1:] == (SIZE, SIZE, 3) and images.dtype == np.uint8
            return quarters(images).astype(self.dtype)

        return encode


def quarters(images: np.ndarray) -> np.ndarray:
    """uint8 [..., 8, 8, 3] -> float32 [..., 4, 3]."""
    blocks = (
        images.reshape(*images.shape[:-3], 2, 4, 2, 4, 3).astype(np.float32).mean(axis=(-4, -2))
    )
    return blocks.reshape(*images.shape[:-3], 4, 3)


def noise(number: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(
        data, "PNG"
    )
    return data.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Pages and clips with unequal numbers of images, in several parts."""
    folder = tmp_path_factory.mktemp("sets")
    pages, clips = [], []
    for i in range(7):
        images = [noise(10 * i + j) for j in range(1 + i % 3)]
        pages.append(
            SplitRecord(
                "train",
                {
                    "id": f"page{i}",
                    "texts": ["", *(f"red circle {j}" for j in range(len(images)))],
                    "images": images,
                },
            )
        )
        frames = [noise(100 + 10 * i + j) for j in range(2 + i)]
        clips.append(
            SplitRecord(
                "train",
                {
                    "id": f"clip{i}",
                    "frames": frames,
                    "fps": 1.0,
                    "captions": [f"star left {i}"],
                },
            )
        )
    write_dataset(folder / "pages", Given("pages", tuple(pages)))
    write_dataset(folder / "videos", Given("videos", tuple(clips)))
    return {"pages": folder / "pages", "videos": folder / "videos"}


DATASETS = {
    "pages": DatasetConfig("pages", batch_size=2, max_length=48, visuals=3),
    "videos": DatasetConfig("videos", batch_size=2, max_length=48, visuals=2, frames=4),
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "RECORDS", 3)
    monkeypatch.setattr(feature_cache, "BATCH", 4)


@pytest.mark.parametrize("kind", ["pages", "videos"])
def test_rows_hold_the_features_of_the_images_they_would_hold(
    kind: str,
    sets: dict[str, pathlib.Path],
    tokenizer: Tokenizer,
) -> None:
    dataset = dataclasses.replace(DATASETS[kind], path=str(sets[kind]))
    options = {"tokenizer": tokenizer, "task": "flamingo", "image_size": SIZE, "mean": MEAN}
    plain = make_iterator(dataset, **options)
    cached = make_iterator(dataset, encoder=Quarters(), **options)
    for _ in range(8):
        expected, found = next(plain), next(cached)
        images = expected.pop("images")
        # Blanks are zero in either form.
        np.testing.assert_allclose(found.pop("features"), quarters(images), rtol=1e-6)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
    plain.close()
    cached.close()
    fixed = make_held_out(dataset, batches=1, encoder=Quarters(), **options)[0]
    np.testing.assert_allclose(
        fixed["features"],
        quarters(make_held_out(dataset, batches=1, **options)[0]["images"]),
        rtol=1e-6,
    )


def opened(
    path: pathlib.Path,
    encoder: Quarters,
    feature: str = "images",
    kind: str = "pages",
    **options: int,
) -> feature_cache.CachedFeatures:
    folder = next(path.iterdir())
    return feature_cache.load_or_encode(
        open_records(folder, "train", kind),
        feature,
        encoder,
        folder,
        "train",
        image_size=SIZE,
        mean=MEAN,
        **options,
    )


def test_parts_are_made_once_and_anew_when_the_dataset_is(
    sets: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    encoder = Quarters("once")
    first = opened(sets["pages"], encoder)
    calls = encoder.calls
    assert calls > 0
    again = opened(sets["pages"], encoder)
    assert encoder.calls == calls
    np.testing.assert_array_equal(first.read(4, 1), again.read(4, 1))
    folder = next(sets["pages"].iterdir())
    store = folder / "features_once_train"
    (store / "00001.npy").unlink()
    opened(sets["pages"], encoder)
    assert encoder.calls == calls + 2, "only the part that was missing: six images, four at a time"
    for part in store.glob("?????.npy"):
        os.utime(part, (0, (folder / INFO_FILE).stat().st_mtime - 10))
    opened(sets["pages"], encoder)
    assert encoder.calls > calls + 2


def test_an_image_that_questions_share_is_encoded_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "RECORDS", 6)
    frames = [
        [noise(1)],
        [noise(1)],
        [noise(2), noise(1)],
        [noise(2)],
        [noise(3)],
        [noise(1)],
        [noise(1)],
    ]
    asked = [
        SplitRecord(
            "train",
            {
                "id": f"q{i}",
                "frames": some,
                "question": f"which {i}?",
                "answers": ["red"],
                "type": "",
            },
        )
        for i, some in enumerate(frames)
    ]
    write_dataset(tmp_path / "asked", Given("questions", tuple(asked)))
    found = opened(tmp_path / "asked", Quarters(), "frames", "questions")
    store = next(tmp_path.glob("asked/*/features_quarters_train"))
    assert [np.load(store / f"0000{part}.npy").shape[0] for part in range(2)] == [3, 1]
    for place, some in enumerate(frames):
        for number, image in enumerate(some):
            np.testing.assert_allclose(
                found.read(place, number),
                quarters(np.asarray(Image.open(io.BytesIO(image)))),
                rtol=1e-6,
            )
    with pytest.raises(ImageError, match="more images than the 1"):
        found.read(0, 1)


def test_bfloat16_features_come_back_as_such(sets: dict[str, pathlib.Path]) -> None:
    found = opened(
        sets["videos"], Quarters("half", dtype=np.dtype(ml_dtypes.bfloat16)), "frames", "videos"
    ).read(2, 3)
    assert found.dtype == ml_dtypes.bfloat16
    expected = quarters(np.asarray(Image.open(io.BytesIO(noise(123)))))
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=1e-2)


def test_an_image_that_cannot_be_read_is_an_error_of_its_own(tmp_path: pathlib.Path) -> None:
    images = [noise(1), noise(2)[:60], noise(3)]
    example = SplitRecord("train", {"id": "p", "texts": ["", "a", "b", "c"], "images": images})
    write_dataset(tmp_path / "torn", Given("pages", (example,)))
    found = opened(tmp_path / "torn", Quarters())
    assert np.isfinite(found.read(0, 0)).all() and np.isfinite(found.read(0, 2)).all()
    with pytest.raises(ImageError, match="could not be read"):
        found.read(0, 1)
    with pytest.raises(ImageError, match="more images than the 3"):
        found.read(0, 3)


def test_one_sentence_where_features_cannot_be_kept(
    sets: dict[str, pathlib.Path],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    augmented = dataclasses.replace(DATASETS["pages"], path=str(sets["pages"]), colour=0.1)
    with pytest.raises(UserError, match="augmented.*flip and colour to 0"):
        make_iterator(
            augmented,
            tokenizer=tokenizer,
            task="flamingo",
            image_size=SIZE,
            mean=MEAN,
            encoder=Quarters(),
        )
    monkeypatch.setattr(feature_cache.multihost_utils, "sync_global_devices", lambda name: None)
    with pytest.raises(UserError, match="lacks 1 of 3 parts.*all hosts"):
        opened(sets["pages"], Quarters("shared"), index=0, count=2)
    monkeypatch.setattr(
        feature_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})()
    )
    with pytest.raises(UserError, match="MiB are needed.*make room"):
        opened(sets["pages"], Quarters("full"))


def features_of(path: pathlib.Path, found: feature_cache.CachedFeatures) -> list[np.ndarray | None]:
    """Of every image of a set of pages, None for what cannot be read."""
    records = open_records(next(path.iterdir()), "train", "pages")
    made: list[np.ndarray | None] = []
    for place in range(len(records)):
        for image in range(len(records[place]["images"])):
            try:
                made.append(found.read(place, image))
            except ImageError:
                made.append(None)
    return made


def agree(first: list[np.ndarray | None], second: list[np.ndarray | None]) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(a, b) for a, b in zip(first, second, strict=True)
    )


def test_storage_that_fails_for_moments_changes_no_features(
    sets: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When they are made, opened and read; for long it ends the run, without a part that was
    made of it.
    """
    whole = features_of(sets["pages"], opened(sets["pages"], Quarters("calm")))
    faults = Faults(monkeypatch, now_and_then(one_in=1))
    calls = {"load": itertools.count(), "preadv": itertools.count()}

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if next(calls[name]) % 5 < 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args, **options)

        return call

    monkeypatch.setattr(feature_cache.np, "load", failing("load", np.load))
    monkeypatch.setattr(feature_cache.os, "preadv", failing("preadv", os.preadv))
    assert agree(whole, features_of(sets["pages"], opened(sets["pages"], Quarters("moments"))))
    assert agree(whole, features_of(sets["pages"], opened(sets["pages"], Quarters("moments")))), (
        "and again, of what is kept"
    )
    assert faults.failed and next(calls["load"]) > 5 and next(calls["preadv"]) > 5

    faults.plan = ever(errno.ESTALE)
    with pytest.raises(StorageError, match="could not be read 3 times"):
        opened(sets["pages"], Quarters("long"))
    assert not list(next(sets["pages"].iterdir()).glob("features_long_train/?????.npy"))
    found = opened(sets["pages"], Quarters("moments"))
    monkeypatch.setattr(
        feature_cache.os, "preadv", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "x"))
    )
    with pytest.raises(StorageError, match=r"00001.npy could not be read 3 times"):
        found.read(4, 1)


def test_a_part_that_could_not_be_written_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: pathlib.Path, values: np.ndarray) -> None:
        path.write_bytes(values.tobytes()[:10])
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(feature_cache.np, "save", half)
    with pytest.raises(OSError, match="no room"):
        feature_cache._write(tmp_path / "a.npy", np.zeros(9))
    assert not list(tmp_path.iterdir())


def test_parts_that_are_torn_are_made_again(sets: dict[str, pathlib.Path]) -> None:
    """A machine that lost its power leaves files without their ends."""
    whole = features_of(sets["pages"], opened(sets["pages"], Quarters("torn")))
    store = next(sets["pages"].iterdir()) / "features_torn_train"
    for name in ("00001.npy", "00001.counts.npy", "00001.places.npy"):
        data = (store / name).read_bytes()
        for cut in (b"", data[:60], data[:-8]):
            (store / name).write_bytes(cut)
            encoder = Quarters("torn")
            assert agree(whole, features_of(sets["pages"], opened(sets["pages"], encoder))), (
                name,
                len(cut),
            )
            assert encoder.calls == 2, "that part alone"


def test_features_of_a_record_that_was_damaged_are_made_once_it_is_mended(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path, "pages", 8, monkeypatch)
    whole = features_of(folder.parent, opened(folder.parent, Quarters("mended_later")))
    place, mend = hurt(folder, "pages")
    encoder = Quarters("hurt")
    found = opened(folder.parent, encoder)
    with pytest.raises(ImageError, match="damaged on disk when its features were made"):
        found.read(place, 0)
    calls = encoder.calls
    opened(folder.parent, encoder)
    assert encoder.calls == calls, "what is damaged still is not made at every start"
    mend()
    assert (
        agree(whole, features_of(folder.parent, opened(folder.parent, encoder)))
        and calls < encoder.calls < 2 * calls
    )


def test_more_parts_than_open_files(
    sets: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part holds a descriptor or a mapping of its own, and what is open is let go where
    others want it.
    """
    monkeypatch.setattr(feature_cache, "RECORDS", 1)
    found = opened(sets["pages"], Quarters("many"))
    whole = features_of(sets["pages"], found)
    monkeypatch.setattr(feature_cache, "FILES", OpenFiles(feature_cache._File))
    held = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(open_files, "open_files_allowed", lambda: 12)
    assert agree(whole, features_of(sets["pages"], opened(sets["pages"], Quarters("many"))))
    assert len(feature_cache.FILES) == 3 and len(os.listdir("/proc/self/fd")) <= held + 6
    assert "features_many" not in pathlib.Path("/proc/self/maps").read_text()
