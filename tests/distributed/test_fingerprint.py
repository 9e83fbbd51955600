"""What processes tell of themselves before a start."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from data_pipelines.build.synthetic_world import WorldSource
from data_pipelines.build.writer import write_dataset
from flamingo_jax.distributed import fingerprint
from flamingo_jax.distributed.fingerprint import first_difference, run_fingerprint
from flamingo_jax.experiment import DatasetConfig, Experiment


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A host's folder: a dataset as launch.build_data lays it out, and a tokenizer."""
    folder = tmp_path_factory.mktemp("host")
    write_dataset(folder / "data/text", WorldSource("text", 0, 8))
    write_dataset(folder / "more/text", WorldSource("text", 0, 9))
    (folder / "data/tokenizer").mkdir()
    (folder / "data/tokenizer/tokenizer.model").write_bytes(b"pieces")
    return folder


@pytest.fixture
def hosts(built: pathlib.Path, tmp_path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Two hosts' own disks, which hold the same to begin with."""
    return tuple(shutil.copytree(built, tmp_path / name) for name in ("first", "other"))


def experiment(**changes: object) -> Experiment:
    """Names its data as every config does, relative to where the command runs."""
    text = DatasetConfig("text", "data/text")
    options = {
        "tokenizer": "data/tokenizer",
        "data": {"text": text},
        "held_out": {"text": dataclasses.replace(text, split="validation")},
        "vision_encoder_from": "random",
    }
    return Experiment(**(options | changes))  # type: ignore[arg-type]


def difference(hosts: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """Compares what two hosts tell, as it comes over a socket."""
    told = {}
    for name, host in zip(("first", "other"), hosts, strict=True):
        monkeypatch.chdir(host)
        told[name] = json.loads(json.dumps(run_fingerprint(experiment(), pathlib.Path("run"))))
    return first_difference(told)


def test_two_hosts_with_the_same_agree(
    hosts: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a run keeps beside a dataset.
    (hosts[1] / "data/text/1.0.0/lengths_abc_train.npz").write_bytes(b"lengths")
    assert difference(hosts, monkeypatch) == ""
    told = run_fingerprint(experiment(), pathlib.Path("run"))["data"]
    assert told["data/text (train)"].startswith("8 records in 1 file")
    assert set(told) == {"data/text (train)", "data/text (validation)", "data/tokenizer"}


@pytest.mark.parametrize("change", ["records", "missing", "shard", "held out", "tokenizer"])
def test_data_that_differ_are_named(
    change: str, hosts: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = hosts[1] / "data/text"
    named, found = "data/text (train)", ""
    if change == "records":
        shutil.rmtree(text)
        shutil.copytree(hosts[1] / "more/text", text)
        found = "9 records in 1 file"
    elif change == "missing":
        shutil.rmtree(text)
        found = "nothing"
    elif change == "tokenizer":
        (hosts[1] / "data/tokenizer/tokenizer.model").write_bytes(b"seceip")
        named = "data/tokenizer"
    else:
        split = "train" if change == "shard" else "validation"
        (shard,) = text.glob(f"1.0.0/*-{split}.array_record-*")
        shard.write_bytes(shard.read_bytes()[::-1])
        named, found = f"data/text ({split})", "8 records in 1 file"
    told = difference(hosts, monkeypatch)
    assert told.startswith(f"other finds something else at {named} ({found}")
    assert told.endswith("put the same data on all hosts")


def test_a_host_whose_storage_fails_is_named(
    hosts: tuple[pathlib.Path, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hosts[0])
    ours = run_fingerprint(experiment(), pathlib.Path("run"))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fingerprint, "identify", fail)
    told = first_difference({"a": ours, "b": run_fingerprint(experiment(), pathlib.Path("run"))})
    assert "b finds something else at data/text (train) (what cannot be read: Input/output" in told


def test_a_key_that_only_one_has_and_another_workdir_are_named() -> None:
    run = pathlib.Path("run")
    ours = run_fingerprint(experiment(), run)
    assert "config.data" in first_difference(
        {"a": ours, "b": run_fingerprint(experiment(data={}), run)}
    )
    elsewhere = run_fingerprint(experiment(), pathlib.Path("elsewhere"))
    assert "--workdir" in first_difference({"a": ours, "b": elsewhere})
