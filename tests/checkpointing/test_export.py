"""Exports come back bit for bit, and a folder that is not a whole export is refused in one
sentence.
"""

import hashlib
import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest, stored_tensors, streaming
from flamingo_jax.checkpointing.export import export_model, open_export
from flamingo_jax.checkpointing.streaming import HashingReader, StreamedTensor, TensorStream
from flamingo_jax.errors import EXIT_SAVE_FAILED, StorageError, UserError

PARAMETERS = {
    "language_model/layers/attention/query": (
        jnp.arange(12 * 6, dtype=jnp.bfloat16).reshape(12, 2, 3)
    ),
    "language_model/layers/gate": jnp.arange(12.0),
    "language_model/embedding": jnp.linspace(0, 1, 35).reshape(7, 5),
    "encoder/layers/layers/w": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
    "temperature": jnp.float32(0.5),
}

RNG = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "sp.model").write_bytes(b"pieces")
    (tmp_path / "log").write_text("a line\n")
    export_model(
        tmp_path / "export",
        kind="flamingo",
        config={"width": 8, "vision": {"variant": "tiny"}},
        parameters=PARAMETERS,
        tokenizer_file=tmp_path / "sp.model",
        extra_files={"notes/metrics.jsonl": tmp_path / "log"},
        shard_bytes=100,
    )
    return tmp_path / "export"


def test_round_trip(folder: pathlib.Path) -> None:
    export = open_export(folder)
    export.verify()
    assert export.kind == "flamingo" and export.config == {
        "width": 8,
        "vision": {"variant": "tiny"},
    }
    assert export.names == tuple(sorted(PARAMETERS))
    assert export.tokenizer_file is not None and export.tokenizer_file.read_bytes() == b"pieces"
    assert (folder / "notes/metrics.jsonl").read_text() == "a line\n"
    values = export.read()
    assert set(values) == set(PARAMETERS)
    for name, value in PARAMETERS.items():
        assert values[name].dtype == value.dtype
        np.testing.assert_array_equal(values[name], np.asarray(value))
    assert values["language_model/layers/attention/query"].dtype == ml_dtypes.bfloat16
    assert set(export.read("language_model/")) == {
        name for name in PARAMETERS if name.startswith("language_model/")
    }


def test_files_are_plain_safetensors_with_per_layer_names(folder: pathlib.Path) -> None:
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 3
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        # 140 bytes: one array larger than a shard, in a file to itself.
        assert len(content) - 8 - int.from_bytes(content[:8], "little") in (*range(101), 140)
    name = "language_model/layers/11/attention/query"
    with safe_open(folder / files[name], framework="numpy") as file:
        np.testing.assert_array_equal(
            file.get_tensor(name),
            np.asarray(PARAMETERS["language_model/layers/attention/query"][11]),
        )
    assert not (folder.parent / "export.writing").exists()


def test_sharded_arrays_are_exported_whole(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh(
        (4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
    )
    value = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.NamedSharding(mesh, jax.P("x")))
    export_model(tmp_path / "e", kind="contrastive", config={}, parameters={"w": value})
    export = open_export(tmp_path / "e")
    assert export.tokenizer_file is None
    np.testing.assert_array_equal(export.read()["w"], np.arange(32.0).reshape(8, 4))


def test_the_digest_names_the_content(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def digest(name: str, value: float) -> str:
        export_model(
            tmp_path / name, kind="contrastive", config={}, parameters={"w": np.full(3, value)}
        )
        return open_export(tmp_path / name).digest

    assert digest("a", 1.0) == digest("b", 1.0) != digest("c", 2.0)


def refused(folder: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_export(folder)
    return str(caught.value)


def test_missing_and_foreign_folders_are_refused(tmp_path: pathlib.Path) -> None:
    assert "is no folder" in refused(tmp_path / "nowhere")
    assert "is no export" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "is no export" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "is no export" in refused(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"format": "flamingo_jax", "version": 9, "kind": "flamingo", "config": {}}'
    )
    assert "version 9" in refused(tmp_path)


def test_missing_and_truncated_files_are_refused_at_once(folder: pathlib.Path) -> None:
    shard = next(folder.glob("model-00002*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert shard.name in refused(folder)
    shard.unlink()
    assert f"{shard.name} is missing" in refused(folder)
    shard.write_bytes(whole)
    (folder / "manifest.json").unlink()
    assert "lacks its manifest.json" in refused(folder)


def test_a_flipped_byte_is_found_by_verify(folder: pathlib.Path) -> None:
    shard = next(folder.glob("model-00003*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        open_export(folder).verify()


@pytest.mark.parametrize(
    "file", ["config.json", "manifest.json", "model.safetensors.index.json", "model-00003*"]
)
def test_what_cannot_be_read_just_now_is_no_damage(
    file: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to itself: the system refuses to open it (ELOOP), for root too."""
    monkeypatch.setattr(manifest, "READ_AGAIN_AFTER", (0.0,))
    export, (victim,) = open_export(folder), folder.glob(file)
    kept = victim.rename(folder.parent / "kept")
    victim.symlink_to(victim)
    names = list(PARAMETERS)
    attempts: list[Any] = [lambda: open_export(folder)]
    if file != "manifest.json":
        attempts.append(export.verify)
    if victim.suffix == ".safetensors":
        attempts += [
            export.read,
            lambda: export.shapes,
            lambda: stored_tensors.read_headers([victim]),
        ]
    for attempt in attempts:
        with pytest.raises(
            StorageError, match="cannot be read just now .Too many levels"
        ) as caught:
            attempt()
        assert caught.value.exit_code == EXIT_SAVE_FAILED and "again" not in str(
            caught.value
        ).replace("start again", "")
    victim.unlink()
    kept.rename(victim)
    open_export(folder).verify()
    assert set(export.read()) == set(names)


def test_a_tensor_that_cannot_be_read_just_now_is_no_damage_and_one_that_ends_too_early_is(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "READ_AGAIN_AFTER", (0.0,))
    name = "language_model/embedding"
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {name: jax.ShapeDtypeStruct((7, 5), jnp.float32, sharding=one)}
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    export, victim = open_export(folder), folder / files[name]
    np.testing.assert_array_equal(export.read_sharded(targets)[name], np.asarray(PARAMETERS[name]))
    content = victim.read_bytes()
    victim.unlink()
    victim.symlink_to(victim)
    with pytest.raises(StorageError, match="cannot be read just now"):
        export.read_sharded(targets)
    victim.unlink()
    victim.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{victim.name} ends too early: copy it again") as caught:
        export.read_sharded(targets)
    assert not isinstance(caught.value, StorageError)


def test_nothing_is_overwritten_and_a_failed_export_leaves_nothing(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is there already"):
        export_model(folder, kind="flamingo", config={}, parameters={})
    with pytest.raises(UserError, match="is missing"):
        export_model(
            tmp_path / "e",
            kind="flamingo",
            config={},
            parameters=PARAMETERS,
            tokenizer_file=tmp_path / "none",
        )

    def full(*args: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flamingo_jax.checkpointing.shard_writer.manifest.sync_file", full)
    with pytest.raises(UserError, match="No space left"):
        export_model(tmp_path / "e", kind="flamingo", config={}, parameters=PARAMETERS)
    assert not list(tmp_path.glob("e*.writing")) and not (tmp_path / "e").exists()


class Killed(Exception):
    """Stands for the end of a process."""


def stream_of(
    values: dict[str, np.ndarray], identity: str, read: list[str], end: str = ""
) -> TensorStream:
    """Streams arrays row by row; notes what is read, and ends at one of them."""

    def rows(name: str) -> Iterator[np.ndarray]:
        if name == end:
            raise Killed
        read.append(name)
        yield from values[name].reshape(len(values[name]), -1)

    tensors = [
        StreamedTensor(
            name, value.dtype, value.shape, lambda reader, name=name: rows(name), value[0].nbytes
        )
        for name, value in values.items()
    ]
    return TensorStream(tensors, identity)


def test_a_killed_export_goes_on_with_its_whole_files(tmp_path: pathlib.Path) -> None:
    values = {f"w{n}": RNG.normal(size=(4, 5)).astype(np.float32) for n in range(6)}

    def export(name: str, identity: str, end: str = "") -> list[str]:
        read: list[str] = []
        # Two arrays of 80 bytes to a file.
        export_model(
            tmp_path / name,
            kind="contrastive",
            config={},
            parameters=stream_of(values, identity, read, end),
            shard_bytes=160,
        )
        return read

    with pytest.raises(Killed):
        export("a", "run", end="w5")
    unfinished = tmp_path / "a.writing"
    whole = sorted(file.name for file in unfinished.glob("*.safetensors"))[:2]
    assert not (tmp_path / "a").exists() and len(whole) == 2
    # One of the two whole files is damaged: it is written again, like the one that was not whole.
    content = bytearray((unfinished / whole[0]).read_bytes())
    content[-1] ^= 1
    (unfinished / whole[0]).write_bytes(content)
    assert export("a", "run") == ["w0", "w1", "w4", "w5"]
    assert export("b", "") == list(values)
    found, once = open_export(tmp_path / "a"), open_export(tmp_path / "b")
    found.verify()
    assert found.digest == once.digest and not list(tmp_path.glob("*/.export*"))
    for name, value in values.items():
        np.testing.assert_array_equal(found.read()[name], value)
    # Of another source, and of parameters whose identity is not known, nothing is kept.
    for before, after in (("run", "another"), ("", "")):
        with pytest.raises(Killed):
            export("c", before, end="w5")
        assert export("c", after) == list(values)
        shutil.rmtree(tmp_path / "c")


def test_a_full_disk_keeps_what_can_be_continued(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"w": RNG.normal(size=(4, 5))}
    with monkeypatch.context() as patch:

        def full(path: pathlib.Path) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(manifest, "sync_file", full)
        with pytest.raises(UserError, match="No space left .*the same command continues it"):
            export_model(
                tmp_path / "e",
                kind="contrastive",
                config={},
                parameters=stream_of(values, "run", []),
            )
    assert (tmp_path / "e.writing").is_dir()


def test_little_is_in_memory_at_a_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that were made and not yet written or dropped, whatever the writer's pace."""
    monkeypatch.setattr(streaming, "AHEAD_BYTES", 4000)
    alive = most = 0

    class Piece(np.ndarray):
        """An array that counts itself."""

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.nbytes if self.base is None else 0

    def pieces(reader: HashingReader, count: int, size: int) -> Iterator[np.ndarray]:
        nonlocal alive, most
        for _ in range(count):
            alive += size
            most = max(most, alive)
            yield Piece((size,), np.uint8)

    sizes = [(40, 1000), (3, 10_000), (40, 1000), (1, 10_000), (1, 10_000)]
    tensors = [
        StreamedTensor(
            f"w{n}",
            np.dtype(np.uint8),
            (count * size,),
            lambda reader, count=count, size=size: pieces(reader, count, size),
            size,
        )
        for n, (count, size) in enumerate(sizes)
    ]
    taken = 0
    for _, piece in streaming.read_ahead(tensors, HashingReader()):
        taken += piece.nbytes
        time.sleep(0.001)
        del piece
    assert taken == sum(count * size for count, size in sizes)
    # A piece that is larger than the limit is alone.
    assert most <= 10_000


def test_a_file_that_is_read_in_order_is_hashed_on_the_way(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = RNG.bytes(1000)
    (tmp_path / "a").write_bytes(content)
    read, plain = 0, paths.read_into

    def counted(file: pathlib.Path, start: int, memory: np.ndarray) -> np.ndarray:
        nonlocal read
        read += len(memory)
        return plain(file, start, memory)

    monkeypatch.setattr(paths, "read_into", counted)
    expected = manifest.FileDigest(1000, hashlib.sha256(content).hexdigest())
    for ranges, most in (
        ([(0, 400), (400, 300)], 1000),
        ([(100, 50), (700, 300)], 1000),
        ([(500, 500), (0, 500)], 1500),
        ([(0, 600), (300, 600)], 1300),
    ):
        reader, read = HashingReader(), 0
        for start, size in ranges:
            memory = reader.read_into(tmp_path / "a", start, np.empty(size, np.uint8))
            assert memory.tobytes() == content[start : start + size]
        assert reader.digest(tmp_path / "a") == expected and read == most


def test_a_source_that_is_damaged_is_not_exported(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    export = open_export(folder)

    def check(reader: HashingReader) -> None:
        export.check(reader)

    targets = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in export.shapes.items()}
    export_model(
        tmp_path / "copy",
        kind="flamingo",
        config={},
        parameters=TensorStream(export.stream(targets), "a", check),
    )
    for name, value in open_export(tmp_path / "copy").read().items():
        np.testing.assert_array_equal(value, np.asarray(PARAMETERS[name], np.float32))
    shard = next(folder.glob("model-00003*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=shard.name):
        export_model(
            tmp_path / "other",
            kind="flamingo",
            config={},
            parameters=TensorStream(export.stream(targets), "b", check),
        )
    assert not (tmp_path / "other").exists()
