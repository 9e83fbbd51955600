"""Runs, checkpoints and exports in a bucket, in an object store that fails now and then."""

import json
import logging
import pathlib
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flamingo_jax import bucket_path, folder_lock, json_lines, paths
from flamingo_jax.checkpointing import bucket_arrays, manifest
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import export_model, open_export
from flamingo_jax.checkpointing.shard_writer import PLAN
from flamingo_jax.errors import UserError
from flamingo_jax.folder_lock import FolderLock, FolderLockedError
from tests.object_store import ObjectStore, object_store, s3_server  # noqa: F401

STATE = {
    "trainable/a": jnp.arange(24, dtype=jnp.bfloat16).reshape(2, 3, 4),
    "trainable/b": jnp.linspace(0, 1, 7),
    "rng": jax.random.key_data(jax.random.key(3)),
    "step": jnp.int32(5),
    "none": jnp.zeros((0, 4)),
}


def like(state: dict[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in state.items()}


def require_equal(found: dict[str, jax.Array], wanted: dict[str, jax.Array]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value))


@pytest.fixture
def folder(object_store: ObjectStore) -> pathlib.Path:  # noqa: F811
    return paths.as_path(object_store.address)


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_places_are_told_apart(tmp_path: pathlib.Path) -> None:
    assert paths.as_path(str(tmp_path)) == tmp_path and not paths.is_bucket(tmp_path)
    assert paths.is_bucket("gs://a/b") and not paths.is_bucket("a/b")
    for place, sentence in (
        ("http://a/b", "http://, which is not known"),
        ("s3://", "names no bucket"),
        ("gs:///", "names no bucket"),
    ):
        with pytest.raises(UserError, match=sentence):
            paths.as_path(place)
    with pytest.raises(UserError, match=r"datasets are read as files: mount the bucket \(gcsfuse"):
        paths.require_mounted("gs://bucket/data", "config.data.m3w.path")
    paths.require_mounted(str(tmp_path), "config.data.m3w.path")


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gcsfs: pip install 'flamingo_jax\[bucket\]'"):
        paths.as_path("gs://bucket/run")


def test_a_chunk_divides_what_a_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_arrays, "CHUNK_BYTES", 64)
    for shape in ((), (3,), (12, 5), (7, 64), (2, 3, 1000), (0, 4)):
        chunk = bucket_arrays.chunk_shape(shape, 4)
        assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))
    assert bucket_arrays.chunk_shape((12, 5), 4) == [3, 5]


def test_one_writer_alone_makes_a_file(folder: pathlib.Path) -> None:
    made = []
    threads = [
        threading.Thread(target=lambda i=i: made.append(paths.create(folder / "x", bytes([i]))))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    assert paths.version(folder / "x").bytes == 1
    with pytest.raises(FileNotFoundError):
        paths.version(folder / "y")


def test_a_folder_is_locked_by_one_process(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = FolderLock(folder / "run", "a run")
    with pytest.raises(FolderLockedError, match="is held by a run"):
        FolderLock(folder / "run", "a run")
    lock.release()
    lock = FolderLock(folder / "run", "a run")
    (file,) = (folder / "run").iterdir()
    # As another machine has left it, that has died.
    lease = json.loads(file.read_text()) | {"machine": "another"}
    lock.release()
    file.write_text(json.dumps(lease))
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(folder_lock, "LOOK_EVERY", 0.2)
    FolderLock(folder / "run", "a run").release()
    assert not paths.as_path(f"{folder}/run").exists()


def test_lines_are_parts_that_do_not_grow(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "PART_BYTES", 200)
    path = folder / "metrics.jsonl"
    assert json_lines.read_lines(path) == []
    writer = json_lines.reopen(path, [])
    lines = [{"step": step, "loss": step / 3} for step in range(60)]
    for line in lines:
        writer.write(json.dumps(line) + "\n")
        if line["step"] % 7 == 0:
            writer.flush()
            assert json_lines.read_lines(path) == lines[: line["step"] + 1]
    writer.close()
    assert json_lines.read_lines(path) == lines
    parts = sorted(file.name for file in folder.iterdir())
    assert len(parts) > 5 and "metrics.1.jsonl" in parts
    assert all(paths.version(folder / name).bytes < 500 for name in parts)
    # A resumed run cuts off what comes after its checkpoint.
    writer = json_lines.reopen(path, lines[:10])
    writer.write('{"step": 10}\n')
    writer.close()
    assert json_lines.read_lines(path) == [*lines[:10], {"step": 10}]
    assert json_lines.read_bytes(path).count(b"\n") == 11


def test_checkpoints_come_back_from_a_store_that_fails(
    folder: pathlib.Path,
    object_store: ObjectStore,  # noqa: F811
) -> None:
    object_store.faults.one_in = 20
    before = object_store.faults.failed
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=2)
    for step in (1, 2, 3):
        checkpoints.save(step, STATE | {"step": jnp.int32(step)}, {"clock": step})
    checkpoints.close()
    again = Checkpoints(folder / "checkpoints", keep_last=2)
    assert again.latest() == 3
    assert sorted(paths.subfolders(folder / "checkpoints")) == ["2", "3"]
    require_equal(again.restore(3, like(STATE)), STATE | {"step": jnp.int32(3)})
    assert again.extra(2) == {"clock": 2}
    with pytest.raises(UserError, match="3 is there already"):
        again.save(3, STATE, {})
    assert object_store.faults.failed > before


def test_any_mesh_restores_what_another_saved(folder: pathlib.Path) -> None:
    devices = np.array(jax.devices()[:8]).reshape(-1, 2) if len(jax.devices()) > 1 else None
    if devices is None:
        pytest.skip("one device")
    mesh = jax.sharding.Mesh(devices, ("a", "b"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b", "a"))
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a"))
    value = jnp.arange(64.0).reshape(8, 8)
    checkpoints = Checkpoints(folder, keep_last=1)
    checkpoints.save(1, {"x": jax.device_put(value, spread)}, {})
    template = {"x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=other)}
    found = checkpoints.restore(1, template)["x"]
    assert found.sharding == other
    np.testing.assert_array_equal(np.asarray(found), np.asarray(value))


def test_a_damaged_checkpoint_is_passed_over_and_saved_again(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(folder, keep_last=3)
    for step in (1, 2):
        checkpoints.save(step, STATE, {})
    checkpoints.close()
    flip(folder / "2" / "state" / "trainable" / "b" / "c" / "0")
    looked = Checkpoints(folder, keep_last=3).newest()
    assert looked.step == 1 and "c/0 has other content" in looked.skipped[2]
    again = Checkpoints(folder, keep_last=3)
    with caplog.at_level(logging.WARNING):
        assert again.latest() == 1
    assert "manifest.json.damaged is damaged" in caplog.text
    assert "it was damaged" in Checkpoints(folder, keep_last=3).newest().skipped[2]
    again.save(2, STATE, {"new": True})
    again.close()
    assert Checkpoints(folder, keep_last=3).latest() == 2


def test_a_save_that_was_killed_is_no_checkpoint(folder: pathlib.Path) -> None:
    checkpoints = Checkpoints(folder, keep_last=3)
    for step in (1, 2):
        checkpoints.save(step, STATE, {})
    checkpoints.close()
    (folder / "2" / manifest.NAME).unlink()
    again = Checkpoints(folder, keep_last=3)
    assert again.latest() == 1
    again.save(2, STATE | {"step": jnp.int32(9)}, {})
    again.close()
    require_equal(
        Checkpoints(folder, keep_last=3).restore(2, like(STATE)), STATE | {"step": jnp.int32(9)}
    )


def test_an_export_is_written_and_read_where_it_lies(
    folder: pathlib.Path,
    object_store: ObjectStore,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    parameters = {
        "language_model/layers/attention/query": np.arange(72, dtype=ml_dtypes.bfloat16).reshape(
            12, 2, 3
        ),
        "language_model/embedding": np.linspace(0, 1, 35, dtype=np.float32).reshape(7, 5),
    }

    def export(to: pathlib.Path) -> None:
        export_model(
            to,
            kind="flamingo",
            config={"width": 8},
            parameters=parameters,
            tokenizer_file=tmp_path / "tokenizer.model",
            extra_files={"log.jsonl": tmp_path / "tokenizer.model"},
            shard_bytes=100,
        )

    object_store.faults.one_in = 20
    export(folder / "export")
    export(tmp_path / "export")
    found, local = open_export(f"{folder}/export"), open_export(tmp_path / "export")
    found.verify()
    assert found.shapes == local.shapes and found.names == local.names
    values = found.read()
    for name, value in parameters.items():
        np.testing.assert_array_equal(values[name], value)
    targets = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in found.shapes.items()
    }
    for name, array in found.read_sharded(targets).items():
        np.testing.assert_array_equal(np.asarray(array), parameters[name].astype(np.float32))
    with pytest.raises(UserError, match="is there already"):
        export(folder / "export")
    # What a killed export leaves has a plan and no manifest, and is written anew.
    assert PLAN not in [file.name for file in (folder / "export").iterdir()]
    (folder / "export" / manifest.NAME).unlink()
    (folder / "export" / PLAN).write_text("{}")
    with pytest.raises(UserError, match="lacks its manifest"):
        open_export(folder / "export")
    export(folder / "export")
    open_export(folder / "export").verify()
    # Somebody's own folder is not.
    (folder / "other" / "work.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export(folder / "other")


def test_a_damaged_export_is_named(folder: pathlib.Path) -> None:
    export_model(
        folder / "e", kind="flamingo", config={}, parameters={"a": np.arange(9, dtype=np.float32)}
    )
    flip(folder / "e" / "model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match="model-00001-of-00001.safetensors has other content"):
        open_export(folder / "e").verify()
    content = (folder / "e" / "model-00001-of-00001.safetensors").read_bytes()
    (folder / "e" / "model-00001-of-00001.safetensors").write_bytes(content[:-4])
    with pytest.raises(UserError, match="bytes instead of"):
        open_export(folder / "e")


def test_a_bucket_that_is_not_there_is_said(object_store: ObjectStore) -> None:  # noqa: F811
    with pytest.raises(UserError, match="there is no bucket for s3://absent-models/run"):
        FolderLock(paths.as_path("s3://absent-models/run"), "a run")


def test_what_the_stores_libraries_raise_is_an_error_of_the_storage(
    object_store: ObjectStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a store that does not answer they raise what is no OSError."""
    import botocore.exceptions

    def fail(*arguments: object, **options: object) -> None:
        raise botocore.exceptions.EndpointConnectionError(endpoint_url="http://gone")

    place = paths.as_path(object_store.address)
    store = bucket_path.file_system("s3")
    for method in ("cat_file", "pipe_file", "info", "find", "ls", "exists"):
        monkeypatch.setattr(store, method, fail)
    for attempt in (
        place.read_bytes,
        lambda: place.write_bytes(b"1"),
        place.exists,
        lambda: paths.version(place),
        lambda: list(paths.files_below(place)),
        lambda: paths.subfolders(place),
    ):
        with pytest.raises(OSError, match="Could not connect to the endpoint"):
            attempt()
    monkeypatch.setattr(bucket_path, "_reached", set())
    with pytest.raises(UserError, match="cannot be reached .Could not connect"):
        paths.as_path(object_store.address)
