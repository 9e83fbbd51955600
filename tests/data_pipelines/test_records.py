"""Datasets on disk come back with their images encoded, and what is no dataset is refused."""

import io
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.features import features
from data_pipelines.records import (
    IMAGE_FEATURES,
    Failures,
    ParsedSplit,
    RecordCache,
    left_encoded,
    open_records,
)
from flamingo_jax.errors import UserError
from flamingo_jax.processing.images import ImageError


def png(level: int) -> io.BytesIO:
    data = io.BytesIO()
    Image.new("RGB", (6, 4), (level, level, level)).save(data, "PNG")
    data.seek(0)
    return data


MAKE = {
    "pages": lambda i: {"texts": ["", "a", "b"], "images": [png(i), png(i + 100)]},
    "pairs": lambda i: {"captions": ["a", "naïve"], "image": png(i)},
    "videos": lambda i: {"captions": ["a"], "frames": [png(i), png(i + 100)], "fps": 1.0},
    "text": lambda i: {"text": f"text {i}"},
}


def build(kind, folder, count):
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = kind

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features(kind))

        def _split_generators(self, manager):
            return {"train": ((str(i), {"id": str(i)} | MAKE[kind](i)) for i in range(count))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Builder(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("kind", MAKE)
def test_records_of_every_kind(kind, folder):
    path = build(kind, folder, 3)
    records = RecordCache(open_records(path, "train", kind), kind, 6, cache_bytes=0)
    assert sorted(record.id for record in map(records.__getitem__, range(3))) == ["0", "1", "2"]
    for place in range(3):
        record = records[place]
        level = int(record.id)
        if kind == "text":
            assert record.fields["text"] == f"text {level}".encode()
            continue
        assert record.frame_counts == {"pages": [1, 1], "pairs": [1], "videos": [2]}[kind]
        assert (record.read(0, 0) == level).all() and record.read(0, 0).shape == (4, 6, 3)
        if kind != "pairs":
            assert (record.read(*((1, 0) if kind == "pages" else (0, 1))) == level + 100).all()


@pytest.mark.parametrize("kind", MAKE)
def test_records_are_what_tfds_decodes(kind, folder):
    path = build(kind, folder, 3)
    feature = IMAGE_FEATURES.get(kind)
    decoded = tfds.builder_from_directory(path).as_data_source(
        "train", decoders=left_encoded([feature] if feature else [])
    )
    opened = open_records(path, "train", kind)
    assert len(opened) == len(decoded) == 3
    for ours, theirs in zip((opened[place] for place in range(3)), decoded, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            values = list(theirs[name]) if isinstance(ours[name], list) else theirs[name]
            assert ours[name] == values and type(ours[name]) is type(values), name


@pytest.mark.parametrize("hurt", ["id", "captions", "image"])
def test_an_example_that_lacks_a_field_or_has_several_is_an_error(hurt):
    example = tf_example_pb2.Example()
    for name in ("id", "captions", "image"):
        example.features.feature[name].bytes_list.value.extend(
            [b"a", b"b"] if name == "captions" else [b"a"]
        )

    def parsed():
        return ParsedSplit(
            [example.SerializeToString()], {"id": False, "captions": True, "image": False}
        )[0]

    assert parsed() == {"id": b"a", "captions": [b"a", b"b"], "image": b"a"}
    if hurt != "captions":
        example.features.feature[hurt].bytes_list.value.append(b"c")
        with pytest.raises(ValueError, match=f"2 of {hurt}"):
            parsed()
    del example.features.feature[hurt]
    with pytest.raises(ValueError, match=f"no {hurt}"):
        parsed()


def test_what_is_known_of_a_record_is_not_read_again():
    class Counted(list):
        read = 0

        def __getitem__(self, place):
            self.read += 1
            return super().__getitem__(place)

    source = Counted([{"id": "a", "texts": ["", "x"], "images": [png(7).getvalue()]}])
    records = RecordCache(source, "pages", 6, cache_bytes=0)
    assert records[0].cached("", lambda: "made") == "made"
    again = records[0]
    assert (
        again.id,
        again.frame_counts,
        again.damaged,
        again.cached("", lambda: "made anew"),
    ) == ("a", [1], False, "made")
    assert source.read == 1
    assert (again.read(0, 0) == 7).all() and again.fields["texts"] == ["", "x"]
    assert source.read == 2, "one visit reads it once"


def test_threads_that_want_its_images_read_a_record_once():
    class Slow(list):
        read = 0

        def __getitem__(self, place):
            self.read += 1
            time.sleep(0.05)  # For others to come meanwhile.
            return super().__getitem__(place)

    images = [png(level).getvalue() for level in range(4)]
    source = Slow([{"id": "a", "texts": [""] * 5, "images": images}])
    records = RecordCache(source, "pages", 6, cache_bytes=0)
    assert records[0].id == "a" and source.read == 1
    again = records[0]
    with ThreadPoolExecutor(4) as pool:
        shown = list(pool.map(lambda visual: int(again.read(visual, 0).mean()), range(4)))
    assert shown == list(range(4)) and source.read == 2


def test_what_is_no_dataset_is_refused(folder, tmp_path):
    path = build("pairs", folder, 3)
    assert len(open_records(pathlib.Path(path).parent, "train", "pairs")) == 3, (
        "the version may be left out"
    )
    with pytest.raises(UserError, match="no split 'test'; it has train: .* --test_share"):
        open_records(path, "test", "pairs")
    with pytest.raises(UserError, match="has no images, texts, so it is not of kind 'pages'"):
        open_records(path, "train", "pages")
    with pytest.raises(UserError, match="has no text, so it is not of kind 'text'"):
        open_records(path, "train", "text")
    assert {"id", "image", "captions"} == set(open_records(path, "train")[0])
    with pytest.raises(UserError, match="holds no dataset"):
        open_records(tmp_path, "train", "pairs")


def test_memory_is_bounded():
    source = [{"id": str(i), "image": png(i).getvalue(), "captions": [""]} for i in range(5)]
    one = RecordCache(source, "pairs", 6, cache_bytes=0)[0].cost
    records = RecordCache(source, "pairs", 6, cache_bytes=2 * one)
    first = [records[i] for i in range(5)]
    assert [records[i] is first[i] for i in range(5)] == [True, True, False, False, False]


def test_memory_is_counted_by_the_larger_form_of_an_image():
    source = [{"id": "a", "frames": [bytes(5_000), bytes(10)], "captions": []}]
    decoded = 3 * 6 * 6
    costs = {
        wanted: RecordCache(source, "videos", 6, cache_bytes=0, with_images=wanted)[0].cost
        for wanted in (True, False)
    }
    assert costs[True] - costs[False] == 5_000 + decoded + 2 * 200
    assert RecordCache(source, "videos", 6, cache_bytes=0, with_images=False)[0].frame_counts == [2]


def test_missing_images_are_failures():
    record = RecordCache(
        [{"id": "a", "texts": ["", "x", "y"], "images": [png(1).getvalue()]}],
        "pages",
        6,
        cache_bytes=0,
    )[0]
    with pytest.raises(ImageError, match="more images than the 1"):
        record.read(1, 0)


def test_share_of_failures():
    few = Failures("few", 50)
    for _ in range(4):
        few.saw(50)
        few.add("bad", ValueError("cut short"))
    many = Failures("many", 10_000)
    for name in "abcdef":
        many.add(name, ValueError("x"))
    many.saw(99)
    with pytest.raises(UserError, match="6 of the first 100 records of the dataset many"):
        many.saw(1)


def test_one_failure_in_a_hundred_does_not_stop_a_run():
    for seed in range(20):
        failures = Failures("many", 20_000)
        for place in np.flatnonzero(np.random.default_rng(seed).random(20_000) < 0.01):
            failures.saw(int(place) + 1 - failures.seen)
            failures.add(str(place), ValueError("x"))
