"""A split's identity: the same wherever the same records lie, another for any other."""

import json
import logging
import pathlib
import shutil

import pytest

from data_pipelines.build.synthetic_world import WorldSource
from data_pipelines.build.writer import write_dataset
from flamingo_jax.dataset_identity import (
    Identity,
    find_dataset,
    identify,
    identities,
    require_same_datasets,
)
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A dataset as launch.build_data lays it out: NAME/1.0.0/NAME-SPLIT.array_record-..."""
    folder = tmp_path_factory.mktemp("built")
    write_dataset(folder / "text", WorldSource("text", 0, 40))
    write_dataset(folder / "other" / "text", WorldSource("text", 1, 40))
    write_dataset(folder / "more" / "text", WorldSource("text", 0, 41))
    write_dataset(folder / "again" / "text", WorldSource("text", 0, 40))
    return folder


def identity(path: pathlib.Path, split: str = "train") -> Identity:
    found = identify(path, split)
    assert found is not None
    return found


def shard(folder: pathlib.Path, split: str = "train") -> pathlib.Path:
    (file,) = folder.glob(f"1.0.0/*-{split}.array_record-*")
    return file


def test_the_same_records_have_one_identity(built: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = identity(built / "text")
    assert (first.records, first.files) == (40, 1)
    assert first == identity(built / "text" / "1.0.0") == identity(built / "again" / "text")
    moved = shutil.copytree(built / "text", tmp_path / "elsewhere")
    # What runs and builds keep beside records.
    (moved / "1.0.0" / "lengths_abc_train.npz").write_bytes(b"lengths")
    (moved / "1.0.0" / "features_abc_train").mkdir()
    (moved / "1.0.0" / "statistics.json").write_text("{}")
    assert identity(moved) == first
    assert identity(moved, "validation") != first


def test_other_records_have_another(built: pathlib.Path, tmp_path: pathlib.Path) -> None:
    first = identity(built / "text")
    other, more = identity(built / "other" / "text"), identity(built / "more" / "text")
    assert len({first, other, more}) == 3 and other.records == 40 and more.records == 41


@pytest.mark.parametrize("place", [100, -100])
def test_a_shard_of_the_same_size_with_other_records_is_another(
    built: pathlib.Path, tmp_path: pathlib.Path, place: int
) -> None:
    moved = shutil.copytree(built / "text", tmp_path / "elsewhere")
    content = bytearray(shard(moved).read_bytes())
    content[place] ^= 1
    shard(moved).write_bytes(content)
    assert identity(moved) != identity(built / "text")
    assert identity(moved, "validation") == identity(built / "text", "validation")


@pytest.mark.parametrize("what", ["shard", "features"])
def test_what_a_split_lacks_or_means_counts(
    built: pathlib.Path, tmp_path: pathlib.Path, what: str
) -> None:
    moved = shutil.copytree(built / "text", tmp_path / "elsewhere")
    if what == "shard":
        shard(moved).unlink()
    else:
        (moved / "1.0.0" / "features.json").write_text("{}")
    assert identity(moved) != identity(built / "text")


def test_what_is_no_dataset_has_none(built: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert find_dataset(tmp_path) is None and identify(tmp_path, "train") is None
    assert identify(tmp_path / "missing", "train") is None
    assert identify(built / "text", "trian") is None
    for content in (
        "",
        "{}",
        "[]",
        json.dumps({"splits": [{"name": "train", "shardLengths": "x"}]}),
    ):
        (tmp_path / "dataset_info.json").write_text(content)
        assert identify(tmp_path, "train") is None


def experiment(path: pathlib.Path) -> Experiment:
    train = DatasetConfig("text", str(path))
    held_out = DatasetConfig("text", str(path), split="validation")
    return Experiment(data={"text": train}, held_out={"text": held_out})


def test_a_dataset_that_was_rebuilt_is_refused(
    built: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = experiment(built / "text")
    found = identities(now)
    saved = json.loads(json.dumps(found))
    require_same_datasets(saved, found, now, tmp_path)
    require_same_datasets({}, found, now, tmp_path)
    before = json.loads(json.dumps(identities(experiment(built / "more" / "text"))))
    with pytest.raises(UserError) as caught:
        require_same_datasets(before, found, now, tmp_path)
    told = str(caught.value)
    assert told.startswith(f"the train split of {built}/text (config.data.text) has other content")
    assert "40 records in 1 file" in told and "41 records in 1 file" in told
    assert "put that dataset back, or train in a new workdir" in told
    with caplog.at_level(logging.WARNING):
        require_same_datasets(before | {"data": saved["data"]}, found, now, tmp_path)
    assert "the validation split" in caplog.text and "held-out losses do not compare" in caplog.text
