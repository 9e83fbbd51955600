"""Public datasets in the forms they are published in: what is read from them, in which order,
and how it is found.
"""

import hashlib
import io
import json
import pathlib
import re
import sys
import tarfile
from typing import Any

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.build.coco import Coco
from data_pipelines.build.image_folder import ImageFolder
from data_pipelines.build.mmc4 import Match, Mmc4, match
from data_pipelines.build.obelics import Obelics
from data_pipelines.build.source import SplitFractions
from data_pipelines.build.tfds import Tfds
from data_pipelines.build.video_folder import VideoFolder
from data_pipelines.build.webdataset import WebDataset
from data_pipelines.build.writer import write_dataset
from flamingo_jax.errors import UserError
from tests.data_pipelines.raw import ALL_TRAIN, colourful, film, lines, read, save, strings
from tests.evaluation.test_synthetic_world_page import Counter


def shaded_image(level: int, form: str = "PNG") -> bytes:
    """Told from others by its mean."""
    data = io.BytesIO()
    pixels = np.full((80, 80, 3), level, np.uint8)
    pixels[:40] += 10
    Image.fromarray(pixels).save(data, form)
    return data.getvalue()


def level(pixels: np.ndarray) -> int:
    return round(float(pixels.mean())) - 5


def levels(record: dict[str, Any]) -> list[int]:
    return [level(image) for image in record["images"]]


def shard(path: pathlib.Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset(tmp_path: pathlib.Path) -> None:
    shard(
        tmp_path / "a" / "000.tar",
        {
            "./0.jpg": shaded_image(10, "JPEG"),
            "0.txt": b" a cat \n",
            "0.json": b'{"caption": "not this"}',
            "sub.dir/1.json": b'{"captions": ["x", "y"]}',
            "sub.dir/1.input.PNG": shaded_image(20),
            "2.webp": shaded_image(30, "WEBP"),
            "2.json": b'{"text": "a text"}',
            "2.cls": b"7",
            "3.txt": b"alone",
        },
    )
    shard(
        tmp_path / "b" / "deep" / "000.tar",
        {
            "0.png": shaded_image(40),
            "0.txt": "grün".encode(),
            "1.png": shaded_image(50),
            "1.txt": b" ",
        },
    )
    statistics, _ = write_dataset(
        tmp_path / "out",
        WebDataset((str(tmp_path / "a"), str(tmp_path / "b" / "deep" / "000.tar")), ALL_TRAIN),
    )
    assert statistics["dropped"] == {"no caption": 1, "no image": 1}
    found = {
        name: (level(record["image"]), strings(record["captions"]))
        for name, record in read(tmp_path / "out").items()
    }
    assert found == {
        "a/000/0": (10, ["a cat"]),
        "a/000/sub.dir/1": (20, ["x", "y"]),
        "a/000/2": (30, ["a text"]),
        "deep/000/0": (40, ["grün"]),
    }
    with pytest.raises(UserError, match=r"no tar shard \(.tar, .tar.gz, .*\) below"):
        write_dataset(tmp_path / "none", WebDataset((str(tmp_path / "out"),)))


def test_coco(tmp_path: pathlib.Path) -> None:
    for name, shade in (("one/1.png", 10), ("two/2.png", 20), ("one/3.png", 30)):
        save(tmp_path / name, Image.open(io.BytesIO(shaded_image(shade))))
    images = [
        {"id": number, "file_name": f"{number}.png", "height": 80, "width": 80}
        for number in (1, 2, 3)
    ]
    told = [
        {"id": 7 + place, "image_id": image, "caption": text}
        for place, (image, text) in enumerate([(2, "b"), (1, "a "), (2, "c")])
    ]
    (tmp_path / "captions.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": told})
    )
    source = Coco(
        (str(tmp_path / "captions.json"),),
        (str(tmp_path / "one"), str(tmp_path / "two")),
        ALL_TRAIN,
    )
    statistics, _ = write_dataset(tmp_path / "out", source)
    assert statistics["dropped"] == {"no caption": 1} and statistics["dropped_names"] == {
        "no caption": ["3.png"]
    }
    assert {
        name: (level(record["image"]), strings(record["captions"]))
        for name, record in read(tmp_path / "out").items()
    } == {"1.png": (10, ["a"]), "2.png": (20, ["b", "c"])}
    (tmp_path / "captions.json").write_text('{"images": [')
    with pytest.raises(UserError, match="captions.json is no COCO caption file"):
        write_dataset(tmp_path / "other", source)


def document(sentences: list[str], images: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"text_list": sentences, "image_info": images, **more}


def shown(
    number: int, sentence: int | None = None, similarity: float | None = 0.3
) -> dict[str, Any]:
    return {
        "image_name": f"{number}.png",
        "raw_url": f"http://x/{number}",
        "matched_text_index": sentence,
        "matched_sim": similarity,
    }


def test_mmc4_images_stand_before_their_own_sentences(tmp_path: pathlib.Path) -> None:
    for number in range(10, 100, 10):
        save(tmp_path / f"{number}.png", Image.open(io.BytesIO(shaded_image(number))))
    lines(
        tmp_path / "docs.jsonl",
        # In falling order, and two for one sentence, which stay as they are listed.
        document(
            ["A.", "B.", "C.", "D."], [shown(10, 3), shown(40, 1), shown(20, 0), shown(30, 1)]
        ),
        document(
            ["A.", "B."],
            [
                shown(10, 0, 0.23),
                shown(20, 1, 0.24),
                shown(30, 2),
                shown(40, -1),
                shown(50, True),
                "x",
            ],
        ),
        document(
            ["A.", "B.", "C."],
            [shown(10), shown(20), shown(30, 1)],
            similarity_matrix=[[0.3, 0.2, 0.29], [0.31, 0.1, 0.1], [0, 0, 0]],
        ),
    )
    statistics, _ = write_dataset(tmp_path / "all", Mmc4((str(tmp_path),), (), ALL_TRAIN))
    records = read(tmp_path / "all")
    assert strings(records["docs.jsonl#0"]["texts"]) == [
        "",
        "A.",
        "",
        "B. C.",
        "D.",
    ] and levels(records["docs.jsonl#0"]) == [20, 40, 30, 10]
    assert levels(records["docs.jsonl#1"]) == [10, 20] and statistics["images"]["dropped"] == {
        "matched to no sentence": 4
    }
    assert strings(records["docs.jsonl#2"]["texts"]) == ["", "A.", "B.", "C."] and levels(
        records["docs.jsonl#2"]
    ) == [20, 30, 10]
    statistics, _ = write_dataset(
        tmp_path / "alike",
        Mmc4((str(tmp_path / "docs.jsonl"),), (str(tmp_path),), ALL_TRAIN, min_similarity=0.24),
    )
    assert (
        levels(read(tmp_path / "alike")["docs.jsonl#1"]) == [20]
        and statistics["images"]["dropped"]["similarity under 0.24"] == 1
    )
    with pytest.raises(UserError, match="--min_similarity=30 is no cosine"):
        write_dataset(tmp_path / "none", Mmc4((str(tmp_path),), min_similarity=30))


def test_matching_is_one_to_one_for_the_largest_sum() -> None:
    """Against every way to match."""
    import itertools

    rng = np.random.default_rng(0)
    for images, sentences in ((2, 3), (3, 3), (4, 3)):
        matrix = rng.uniform(0.1, 0.4, (images, sentences))
        matched = match([{} for _ in range(images)], sentences, matrix.tolist())
        found = {place: one for place, one in enumerate(matched) if one}
        assert len({one.sentence for one in found.values()}) == len(found) == min(images, sentences)
        ways = itertools.permutations(range(max(images, sentences)), images)
        best = max(
            sum(
                matrix[place, sentence]
                for place, sentence in enumerate(way)
                if sentence < sentences
            )
            for way in ways
        )
        assert sum(one.similarity for one in found.values()) == pytest.approx(best)
    assert match([{"matched_text_index": 0}], 1, None) == [Match(0, float("inf"))]
    assert match([{}], 2, [[0.1]]) == [None]


def downloads(folder: pathlib.Path) -> None:
    """Four images by address, each in another way."""

    def about(number):
        return json.dumps({"url": f"http://x/{number}", "status": "success"}).encode()

    shard(
        folder / "00000.tar",
        {
            "0.jpg": shaded_image(10, "JPEG"),
            "0.json": about(10),
            "1.json": b'{"url": "http://x/99", "status": "failed"}',
        },
    )
    save(folder / "00001" / "7.png", Image.open(io.BytesIO(shaded_image(20))))
    (folder / "00001" / "7.json").write_bytes(about(20))
    name = hashlib.sha256(b"http://x/30").hexdigest()
    (folder / f"{name}.jpeg").write_bytes(shaded_image(30))
    (folder / "broken.json").write_text("{")


def test_obelics_images_are_found_by_their_address(tmp_path: pathlib.Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    downloads(tmp_path / "downloaded")
    images = [
        ["http://x/10", None, "http://x/20", None, "http://x/99"],
        [None, "http://x/30"],
        [None],
        ["http://x/40", None],
    ]
    texts = [
        [None, "One.\n\nTwo.", None, "Three.", None],
        ["Four.", None],
        ["alone"],
        [None, "lost"],
    ]
    parquet.write_table(
        arrow.table({"images": images, "metadata": ["[]"] * 4, "texts": texts}),
        tmp_path / "a.parquet",
        row_group_size=3,
    )
    statistics, _ = write_dataset(
        tmp_path / "out",
        Obelics((str(tmp_path / "a.parquet"),), (str(tmp_path / "downloaded"),), ALL_TRAIN),
    )
    assert statistics["dropped"] == {"page without an image that is fit": 2} and statistics[
        "images"
    ] == {"used": 3, "dropped": {"missing": 2}}
    records = read(tmp_path / "out")
    first, second = records["a.parquet#0"], records["a.parquet#1"]
    assert strings(first["texts"]) == ["", "One.\nTwo.", "Three."] and levels(first) == [10, 20]
    assert strings(second["texts"]) == ["Four.", ""] and levels(second) == [30]


def test_parquet_files_want_their_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match="needs pyarrow, which is not installed: `pip install pyarrow`"
    ):
        write_dataset(tmp_path / "out", Obelics((str(tmp_path),)))


def test_mmc4_images_are_found_by_their_address_too(tmp_path: pathlib.Path) -> None:
    downloads(tmp_path / "downloaded")
    lines(
        tmp_path / "docs.jsonl",
        document(["A.", "B."], [shown(10, 1), shown(30, 0), shown(50, 0)]),
    )
    statistics, _ = write_dataset(
        tmp_path / "out",
        Mmc4((str(tmp_path / "docs.jsonl"),), (str(tmp_path / "downloaded"),), ALL_TRAIN),
    )
    assert levels(read(tmp_path / "out")["docs.jsonl#0"]) == [30, 10] and statistics["images"][
        "dropped"
    ] == {"missing": 1}


def prepare(
    folder: pathlib.Path, features: dict[str, Any], splits: dict[str, list[dict[str, Any]]]
) -> str:
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.0.0")
        name = "public"

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, manager: object) -> dict[str, object]:
            return {split: iter(list(enumerate(records))) for split, records in splits.items()}

        def _generate_examples(self) -> None:
            raise NotImplementedError

    Builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return str(folder / "public")


def test_tfds_features_are_found_by_their_usual_names_or_as_told(
    tmp_path: pathlib.Path,
) -> None:
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    features = {
        "image": image,
        "captions": tfds.features.Sequence({"id": np.int64, "text": text}),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }

    def told(number):
        return {
            "image": io.BytesIO(shaded_image(number)),
            "captions": [{"id": 1, "text": "a"}, {"id": 2, "text": f"b{number}"}],
            "label": number % 2,
        }

    name = prepare(
        tmp_path / "in",
        features,
        {"train": [told(10), told(21)], "val": [told(30)], "extra": [told(40)]},
    )
    statistics, _ = write_dataset(tmp_path / "pairs", Tfds(name))
    assert statistics["splits"] == {"train": 2, "validation": 1}
    records = read(tmp_path / "pairs")
    assert {
        place: (level(record["image"]), strings(record["captions"]))
        for place, record in records.items()
    } == {"train/0": (10, ["a", "b10"]), "train/1": (21, ["a", "b21"])}
    write_dataset(tmp_path / "classes", Tfds(name, fields=(("captions", "label"),)))
    assert [strings(record["captions"]) for record in read(tmp_path / "classes").values()] == [
        ["cat"],
        ["dog"],
    ]
    with pytest.raises(
        UserError,
        match=r"has no feature 'title'; it has captions/id, captions/text, image, label",
    ):
        write_dataset(tmp_path / "none", Tfds(name, fields=(("captions", "title"),)))
    with pytest.raises(UserError, match="questions need question"):
        write_dataset(tmp_path / "none", Tfds(name, as_kind="questions"))
    with pytest.raises(UserError, match="TFDS has no dataset no_such_thing"):
        write_dataset(tmp_path / "none", Tfds("no_such_thing"))


def test_tfds_questions_and_videos(tmp_path: pathlib.Path) -> None:
    image, text = tfds.features.Image(shape=(None, None, 3)), tfds.features.Text()
    asked = [
        {
            "image": io.BytesIO(shaded_image(10 * (number // 4))),
            "question": f"q{number}",
            "answers": ["x", "x", "y"],
            "question_type": "t",
        }
        for number in range(60)
    ]
    features = {
        "image": image,
        "question": text,
        "answers": tfds.features.Sequence(text),
        "question_type": text,
    }
    source = Tfds(
        prepare(tmp_path / "asked", features, {"train": asked}),
        SplitFractions(0.3),
        (("type", "question_type"),),
    )
    statistics, _ = write_dataset(tmp_path / "questions", source)
    splits = {split: read(tmp_path / "questions", split) for split in ("train", "validation")}
    about = {
        split: {level(record["frames"][0]) for record in records.values()}
        for split, records in splits.items()
    }
    assert about["train"].isdisjoint(about["validation"]) and statistics["used"] == 60
    record = splits["train"][min(splits["train"])]
    assert strings(record["answers"]) == ["x", "x", "y"] and record["type"] == b"t"
    clips = [
        {
            "video": [io.BytesIO(shaded_image(10)), io.BytesIO(shaded_image(20))],
            "caption": "brighter",
        }
    ]
    name = prepare(
        tmp_path / "clips",
        {"video": tfds.features.Sequence(image), "caption": text},
        {"train": clips},
    )
    write_dataset(tmp_path / "videos", Tfds(name, ALL_TRAIN, fps=2.0))
    (clip,) = read(tmp_path / "videos").values()
    assert (
        [level(frame) for frame in clip["frames"]] == [10, 20]
        and clip["fps"] == 2.0
        and strings(clip["captions"]) == ["brighter"]
    )


@pytest.mark.parametrize(
    "ending, codec",
    [
        ("mkv", "mpeg4"),
        ("mov", "mpeg4"),
        ("avi", "mpeg4"),
        ("ts", "mpeg4"),
        ("webm", "libvpx"),
        ("gif", "gif"),
        ("bin", "mpeg4"),
    ],
)
def test_videos_in_any_container(ending: str, codec: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "clips" / f"a.{ending}"
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV writes no {codec}")
    film(
        path,
        3,
        codec=codec,
        form={"bin": "matroska", "mkv": "matroska", "ts": "mpegts"}.get(ending, ending),
    )
    lines(tmp_path / "clips" / "captions.jsonl", {"video": path.name, "caption": "brighter"})
    write_dataset(tmp_path / "out", VideoFolder((str(tmp_path / "clips"),), ALL_TRAIN))
    (record,) = read(tmp_path / "out").values()
    assert [float(frame.mean()) for frame in record["frames"]] == pytest.approx(
        [20, 60, 100], abs=6
    )


def test_samples_show_records_as_text_and_images(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "photos"
    for number in range(40):
        save(root / f"{number}.png", colourful(60, 90, seed=number))
    save(root / "<i>.png", colourful(8, 9))
    told = [
        {
            "image": f"{number}.png",
            "caption": f"number {number} <script>alert(1)</script> & more",
        }
        for number in range(40)
    ]
    lines(root / "captions.jsonl", *told, {"image": "gone & lost.png", "caption": "x"})
    write_dataset(tmp_path / "out", ImageFolder((str(root),), SplitFractions(0.2)))
    text = (tmp_path / "out" / "1.0.0" / "samples.html").read_text("utf-8")
    page = Counter()
    page.feed(text)
    assert (
        not page.opened
        and page.counts["img"] == 24
        and "script" not in page.counts
        and "i" not in page.counts
    )
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    shown = {int(number) for number in re.findall(r"number (\d+) &lt;script&gt;", text)}
    assert len(shown) == 24 and shown <= {
        int(name.split(".")[0]) for name in read(tmp_path / "out")
    }
    assert "gone &amp; lost.png" in text and "&lt;i&gt;.png" in text and "no caption" in text
