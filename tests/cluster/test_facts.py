"""What processes tell of themselves before a start."""

import dataclasses
import json
import pathlib

from flamingo_jax.cluster.facts import first_difference, gather
from flamingo_jax.experiment import DatasetConfig, Experiment


def experiment(folder: pathlib.Path) -> Experiment:
    return Experiment(tokenizer=str(folder / "tokenizer.model"), data={"pairs": DatasetConfig("pairs", str(folder))}, vision_encoder_from="random")


def write(folder: pathlib.Path) -> None:
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "pairs-train.array_record-00000-of-00001").write_bytes(bytes(100))
    (folder / "tokenizer.model").write_bytes(b"pieces")


def test_two_hosts_with_the_same_agree_and_facts_are_json(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "data")
    ours, theirs = (gather(experiment(tmp_path / "data"), tmp_path / "run") for _ in range(2))
    assert first_difference({"a": ours, "b": json.loads(json.dumps(theirs))}) == ""


def test_data_that_differ_are_named(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "data")
    before = gather(experiment(tmp_path / "data"), tmp_path / "run")
    (tmp_path / "data" / "lengths.npy").write_bytes(b"what a run keeps beside a dataset")
    assert first_difference({"a": before, "b": gather(experiment(tmp_path / "data"), tmp_path / "run")}) == ""
    (tmp_path / "data" / "pairs-train.array_record-00000-of-00001").write_bytes(bytes(101))
    told = first_difference({"a": before, "b": gather(experiment(tmp_path / "data"), tmp_path / "run")})
    assert told.startswith("b finds something else at") and str(tmp_path / "data") in told


def test_a_key_that_only_one_has_and_another_workdir_are_named(tmp_path: pathlib.Path) -> None:
    ours = gather(experiment(tmp_path), tmp_path / "run")
    other = dataclasses.replace(experiment(tmp_path), data={})
    assert "config.data" in first_difference({"a": ours, "b": gather(other, tmp_path / "run")})
    assert "--workdir" in first_difference({"a": ours, "b": gather(experiment(tmp_path), tmp_path / "elsewhere")})
