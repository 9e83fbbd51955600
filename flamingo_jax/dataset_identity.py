"""Finds a prepared dataset on disk, and identifies the content of its splits by a digest.

A saved position in a dataset is meaningful only for the same records: a checkpoint stores
both, and all processes of a run must agree. Nothing here reads whole records or opens TFDS.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig, Experiment

log = logging.getLogger(__name__)

VERSION = "1.0.0"
"""The version of datasets built by this project, which is also the name of their subfolder."""
INFO_FILE = "dataset_info.json"
FEATURES_FILE = "features.json"
NOTHING = "nothing"
_ENDS = 4_096
"""Bytes that are read from the start and from the end of each file. ArrayRecord stores its
blocks' sizes at the end, where files of equal size but other records differ.
"""
_THREADS = 16


class Identity(NamedTuple):
    """Identifies the content of a split.

    digest: over its features, the number of records per shard, and the ends of the shards.
    """

    records: int
    files: int
    digest: str

    def __str__(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        return f"{self.records:,} records in {files}, {self.digest}"


def find_dataset(path: str | pathlib.Path) -> pathlib.Path | None:
    """Finds the folder with a dataset's files: `path` itself, or its version `path/1.0.0`;
    None where neither is a finished dataset.
    """
    folder = pathlib.Path(path)
    for candidate in (folder, folder / VERSION):
        if (candidate / INFO_FILE).is_file():
            return candidate
    return None


def identify(path: str | pathlib.Path, split: str) -> Identity | None:
    """Identifies a split by its content, independent of its folder and of other files there.

    It reads the dataset's description and at most 8 KiB of each file.

    Returns: None where there is no such dataset, its description is invalid, or it lacks the
      split.
    Raises: OSError where the storage fails.
    """
    folder = find_dataset(path)
    if folder is None:
        return None
    try:
        info = json.loads((folder / INFO_FILE).read_bytes())
        (described,) = [entry for entry in info["splits"] if entry["name"] == split]
        lengths = [int(length) for length in described.get("shardLengths", ())]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    features = folder / FEATURES_FILE
    content = hashlib.sha256(features.read_bytes() if features.is_file() else b"")
    content.update(json.dumps([split, lengths]).encode())
    shards = _shards(folder, split)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for told in pool.map(_ends, shards):
            content.update(told)
    return Identity(sum(lengths), len(shards), content.hexdigest()[:16])


def identities(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Identifies every dataset: {"data" or "held_out": {name: identity as JSON, or None}}."""
    parts = {"data": experiment.data, "held_out": experiment.held_out}
    return {part: {name: _told(d) for name, d in found.items()} for part, found in parts.items()}


def require_same_datasets(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    experiment: Experiment,
    workdir: pathlib.Path,
) -> None:
    """Compares the datasets with those of a checkpoint in `workdir`. saved, current: as
    returned by `identities`.

    A dataset that is not identified in both is skipped: checkpoints of earlier versions have
    no identities. A changed held-out dataset is only a warning: training is unaffected, but
    its losses are not comparable.

    Raises: UserError where a training dataset has other records now.
    """
    for part, datasets in (("data", experiment.data), ("held_out", experiment.held_out)):
        for name, dataset in datasets.items():
            before = saved.get(part, {}).get(name)
            now = current[part].get(name)
            if before is None or now is None or before == now:
                continue
            sentence = (
                f"the {dataset.split} split of {dataset.path} (config.{part}.{name}) has other "
                f"content ({Identity(**now)}) than when the checkpoint in {workdir} was saved "
                f"({Identity(**before)})"
            )
            if part == "data":
                raise UserError(f"{sentence}: put that dataset back, or train in a new workdir")
            log.warning("%s: held-out losses do not compare with those before", sentence)


def _told(dataset: DatasetConfig) -> dict[str, Any] | None:
    found = identify(dataset.path, dataset.split)
    return None if found is None else found._asdict()


def _shards(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Lists the files of a split, by their names: `NAME-SPLIT.array_record-00000-of-00001`."""
    records = [
        pathlib.Path(entry.path)
        for entry in os.scandir(folder)
        if "record-" in entry.name and entry.is_file()
    ]
    own = [file for file in records if f"-{split}." in file.name]
    # Datasets from elsewhere may name files differently: then all files count for every split.
    return sorted(own or records)


def _ends(file: pathlib.Path) -> bytes:
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        first = stream.read(_ENDS)
        stream.seek(max(size - _ENDS, 0))
        return f"{file.name} {size} ".encode() + first + stream.read(_ENDS)
