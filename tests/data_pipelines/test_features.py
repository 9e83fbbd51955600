"""Every kind of record, written and read back through TFDS alone."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines import features
from data_pipelines.build.source import Converted, DroppedRecord, SplitFractions, SplitRecord
from data_pipelines.build.writer import write_dataset
from flamingo_jax.errors import UserError


def image(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((5, 7, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


RECORDS: dict[str, dict[str, Any]] = {
    "pages": {
        "id": "p",
        "texts": ["", "zwei <image>", "drei\nvier"],
        "images": [image(1), image(2)],
    },
    "pairs": {"id": "q", "image": image(3), "captions": ["ein Café", "two"]},
    "videos": {
        "id": "v",
        "frames": [image(4), image(5), image(6)],
        "fps": 0.5,
        "captions": ["moving"],
    },
    "text": {"id": "t", "text": "line\n\nline"},
    "questions": {
        "id": "f",
        "frames": [image(7)],
        "question": "what?",
        "answers": ["this", "that"],
        "type": "one/what",
    },
}


@dataclasses.dataclass(frozen=True)
class Given:
    """A source of what it is given."""

    kind: str
    outcomes: tuple[Converted, ...]
    about: str = "a test"
    shares: SplitFractions | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"records": len(self.outcomes)}

    def entries(self) -> tuple[Converted, ...]:
        return self.outcomes

    def convert(self, entry: Converted) -> list[Converted]:
        return [entry]


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray) and value.ndim == 3:
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, list | np.ndarray) else value


@pytest.mark.parametrize("kind", features.KINDS)
def test_records_come_back(kind, tmp_path):
    record = RECORDS[kind]
    write_dataset(
        tmp_path / "set", Given(kind, (SplitRecord("train", record), SplitRecord("test", record)))
    )
    builder = tfds.builder_from_directory(str(tmp_path / "set" / "1.0.0"))
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 1,
        "test": 1,
    }
    assert features.kind_of(builder.info.features) == kind
    read = builder.as_data_source(split="test")[0]
    assert set(read) == set(record)
    for name, value in record.items():
        if name in ("image", "images", "frames"):
            shown = [
                np.asarray(Image.open(io.BytesIO(data))).tolist()
                for data in ([value] if name == "image" else value)
            ]
            assert plain(read[name]) == (shown[0] if name == "image" else shown)
        else:
            assert plain(read[name]) == value


def test_splits_by_name_are_found_by_tfds(tmp_path):
    write_dataset(tmp_path / "by_name", Given("text", (SplitRecord("train", RECORDS["text"]),)))
    assert len(tfds.data_source("by_name", data_dir=tmp_path, split="train")) == 1


def test_many_records_make_several_shards_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.build.writer.RECORDS_PER_SHARD", 4)
    monkeypatch.setattr("data_pipelines.build.writer.RECORDS_PER_FLUSH", 3)
    outcomes = tuple(SplitRecord("train", {"id": str(i), "text": "x"}) for i in range(10))
    write_dataset(tmp_path / "many", Given("text", outcomes))
    builder = tfds.builder_from_directory(str(tmp_path / "many" / "1.0.0"))
    assert builder.info.splits["train"].shard_lengths == [4, 4, 2]
    assert [record["id"] for record in builder.as_data_source(split="train")] == [
        str(i).encode() for i in range(10)
    ]


def test_large_records_do_not_wait_for_many(tmp_path, monkeypatch):
    written = []
    add = tfds.core.SequentialWriter.add_examples
    monkeypatch.setattr(
        tfds.core.SequentialWriter,
        "add_examples",
        lambda self, given: (written.append(len(given["train"])), add(self, given)),
    )
    monkeypatch.setattr(
        "data_pipelines.build.writer.BYTES_PER_FLUSH",
        2 * sum(map(len, RECORDS["pages"]["images"])),
    )
    statistics, _ = write_dataset(
        tmp_path / "large", Given("pages", (SplitRecord("train", RECORDS["pages"]),) * 5)
    )
    assert written == [2, 2, 1] and statistics["images"]["used"] == 10


def test_statistics_account_for_every_record(tmp_path):
    outcomes = (
        SplitRecord("train", RECORDS["pages"], ("small",)),
        DroppedRecord("torn"),
        DroppedRecord("torn", ("small", "far")),
        DroppedRecord("empty"),
    )
    statistics, built = write_dataset(tmp_path / "counted", Given("pages", outcomes))
    assert built
    assert {reason: len(names) for reason, names in statistics["dropped_names"].items()} == {
        "empty": 1,
        "torn": 2,
    }
    assert {name: value for name, value in statistics.items() if name != "dropped_names"} == {
        "splits": {"train": 1},
        "records_read": 4,
        "used": 1,
        "dropped": {"empty": 1, "torn": 2},
        "images": {"used": 2, "dropped": {"far": 1, "small": 2}},
        "options": {"records": 4},
    }
    assert (
        json.loads((tmp_path / "counted" / "1.0.0" / "statistics.json").read_text()) == statistics
    )


def test_a_finished_dataset_is_left_alone(tmp_path):
    source = Given("text", (SplitRecord("train", RECORDS["text"]),))
    first, _ = write_dataset(tmp_path / "again", source)
    stamp = (tmp_path / "again" / "1.0.0" / "dataset_info.json").stat().st_mtime_ns
    assert write_dataset(tmp_path / "again", source) == (first, False)
    assert (tmp_path / "again" / "1.0.0" / "dataset_info.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="other options"):
        write_dataset(tmp_path / "again", dataclasses.replace(source, outcomes=source.outcomes * 2))


def test_an_interrupted_build_is_made_again(tmp_path):
    class Interrupted(Given):
        def convert(self, entry):
            raise KeyboardInterrupt

    source = Given("text", (SplitRecord("train", RECORDS["text"]),))
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "torn", Interrupted(source.kind, source.outcomes))
    with pytest.raises(UserError, match="no dataset"):
        features.dataset_folder(tmp_path / "torn")
    (tmp_path / "torn" / "1.0.0.incomplete" / "left").write_text("over")
    write_dataset(tmp_path / "torn", source)
    assert {path.name for path in (tmp_path / "torn").iterdir()} == {"1.0.0"}
    assert (
        features.dataset_folder(tmp_path / "torn")
        == features.dataset_folder(tmp_path / "torn" / "1.0.0")
        == tmp_path / "torn" / "1.0.0"
    )


def test_bad_outputs_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot name a dataset"):
        write_dataset(tmp_path / "My-Set", Given("text", (SplitRecord("train", RECORDS["text"]),)))
    with pytest.raises(UserError, match=r"no record is left.*1 torn"):
        write_dataset(tmp_path / "empty", Given("text", (DroppedRecord("torn"),)))
    with pytest.raises(ValueError, match="no kind"):
        features.features("sounds")


def test_splits_that_get_no_record_are_named(tmp_path, caplog):
    shares, record = SplitFractions(validation=0.1, test=0.2), RECORDS["text"]
    with pytest.raises(
        UserError, match=r"no record is left .* to train on \(1 torn, 2 for validation\)"
    ):
        write_dataset(
            tmp_path / "small",
            Given(
                "text",
                (DroppedRecord("torn"), *[SplitRecord("validation", record)] * 2),
                shares=shares,
            ),
        )
    assert not (tmp_path / "small").exists()
    write_dataset(
        tmp_path / "small",
        Given(
            "text", (SplitRecord("train", record), SplitRecord("validation", record)), shares=shares
        ),
    )

    def warnings():
        return [message for message in caplog.messages if "share" in message]

    (message,) = warnings()
    assert "share of test" in message and "--test_share" in message
    write_dataset(tmp_path / "own", Given("text", (SplitRecord("test", record),)))
    assert len(warnings()) == 1, "a source with splits of its own need not have any"


def test_splits_follow_the_id_alone():
    shares = SplitFractions(validation=0.2, test=0.1)
    splits = [shares.split(f"photo {i}.jpg") for i in range(5_000)]
    assert splits == [shares.split(f"photo {i}.jpg") for i in range(5_000)]
    # Binomial: 4 standard deviations of 5,000 draws.
    assert abs(splits.count("validation") / 5_000 - 0.2) < 4 * (0.2 * 0.8 / 5_000) ** 0.5
    assert abs(splits.count("test") / 5_000 - 0.1) < 4 * (0.1 * 0.9 / 5_000) ** 0.5
