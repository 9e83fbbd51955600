import io
import json
import pathlib

import numpy as np
import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.selection import feature_store
from flamingo_jax.evaluation.selection.feature_store import FeatureSet, FeatureStore

ROWS = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
SET = FeatureSet("encoder", "set", 50)


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


class Encoder:
    """Encodes rows, and is killed before row `until`."""

    def __init__(self, until: int = 50):
        self.until, self.rows = until, 0

    def __call__(self, first: int, stop: int) -> np.ndarray:
        if stop > self.until:
            raise Killed
        self.rows += stop - first
        return ROWS[first:stop]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 12 * 6 * 4)


@pytest.mark.parametrize("until", range(0, 50, 4))
def test_a_killed_computation_goes_on(until: int, tmp_path: pathlib.Path) -> None:
    with pytest.raises(Killed):
        FeatureStore(tmp_path, SET).fill(Encoder(until), batch=4)
    store = FeatureStore(tmp_path, SET)
    assert store.index.rows == until // 12 * 12 and not store.complete
    encoder = Encoder()
    store.fill(encoder, batch=4)
    assert store.complete and encoder.rows == 50 - until // 12 * 12
    again = FeatureStore(tmp_path, SET)
    again.fill(Encoder(0))
    assert (again.rows() == ROWS).all()
    assert [len(block) for block in again.blocks()] == [12, 12, 12, 12, 2]


def test_a_shard_without_an_entry_is_written_again(tmp_path: pathlib.Path) -> None:
    """The process was killed between a shard and the index that names it."""
    (tmp_path / "shard-000000000000.npy").write_bytes(b"half")
    store = FeatureStore(tmp_path, SET)
    store.fill(Encoder(), batch=7)
    assert (FeatureStore(tmp_path, SET).rows() == ROWS).all()


@pytest.mark.parametrize("batch", [5, 13, 50])
def test_a_shard_is_full_whatever_the_batch(batch: int, tmp_path: pathlib.Path) -> None:
    store = FeatureStore(tmp_path, SET)
    store.fill(Encoder(), batch=batch)
    assert [len(block) for block in store.blocks()] == [12, 12, 12, 12, 2]
    assert (store.rows() == ROWS).all()


def test_a_shard_is_an_array_file_of_numpy(tmp_path: pathlib.Path) -> None:
    filled(tmp_path)
    shard = np.load(tmp_path / "shard-000000000012.npy", allow_pickle=False)
    assert shard.dtype == np.float32 and (shard == ROWS[12:24]).all()
    saved = io.BytesIO()
    np.save(saved, ROWS[12:24])
    assert saved.getvalue() == (tmp_path / "shard-000000000012.npy").read_bytes()


def test_a_slow_computation_is_stored_as_it_goes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "SHARD_SECONDS", 0.0)
    store = FeatureStore(tmp_path, SET)
    store.fill(Encoder(), batch=5)
    assert [len(block) for block in store.blocks()] == [5] * 10
    assert (store.rows() == ROWS).all()


def test_float16_is_stored_as_such(tmp_path: pathlib.Path) -> None:
    store = FeatureStore(tmp_path, FeatureSet("encoder", "set", 50, "float16"))
    store.fill(Encoder())
    assert store.rows().dtype == np.float16 and (store.rows() == ROWS.astype(np.float16)).all()


def filled(folder: pathlib.Path) -> FeatureStore:
    store = FeatureStore(folder, SET)
    store.fill(Encoder(), batch=12)
    return store


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "empty"])
def test_a_damaged_shard_is_told(damage: str, tmp_path: pathlib.Path) -> None:
    store = filled(tmp_path)
    shard = tmp_path / "shard-000000000024.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes({"bit": bytes(content), "cut": content[:100], "empty": b""}[damage])
    with pytest.raises(UserError, match=r"shard-0+24.npy .* damaged or missing .*: remove /"):
        store.rows()


def test_an_index_that_no_store_wrote_is_told(tmp_path: pathlib.Path) -> None:
    filled(tmp_path)
    index = tmp_path / "index.json"
    good = json.loads(index.read_text())
    elsewhere = good | {"shards": [good["shards"][0] | {"file": "../../passwd"}]}
    broken = [elsewhere, good | {"format": 2}, good | {"width": 0}, good | {"shards": 3}, [], 7]
    for text in ["", "{", *map(json.dumps, broken)]:
        index.write_text(text)
        with pytest.raises(UserError, match=r"index.json .* damaged or missing"):
            FeatureStore(tmp_path, SET)
    index.write_text(json.dumps(good))
    with pytest.raises(UserError, match="another set or encoder"):
        FeatureStore(tmp_path, FeatureSet("another", "set", 50))


def test_features_that_are_not_finite_are_told(tmp_path: pathlib.Path) -> None:
    def encode(first: int, stop: int) -> np.ndarray:
        rows = ROWS[first:stop].copy()
        rows[np.arange(first, stop) == 17] = np.nan
        return rows

    with pytest.raises(UserError, match="image 17 are not finite"):
        FeatureStore(tmp_path, SET).fill(encode, batch=10)
    with pytest.raises(ValueError, match=r"shape \(50, 5\)"):
        FeatureStore(tmp_path, SET).fill(lambda first, stop: np.zeros((50, 5)), batch=10)
