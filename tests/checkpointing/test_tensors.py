"""Tensors reach sharded arrays whole, in pieces of any size, transposed as their form says."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flamingo_jax.checkpointing import stored_tensors, tensors
from flamingo_jax.checkpointing.stored_tensors import Term, layout, read_headers
from flamingo_jax.checkpointing.streaming import HashingReader, whole
from flamingo_jax.checkpointing.tensor_streams import stream_tensors
from flamingo_jax.checkpointing.tensors import read_sharded
from flamingo_jax.errors import UserError

RNG = np.random.default_rng(0)
# {name: (form, stored shape, parameter's shape, the same by numpy)}
FORMS: dict[str, Any] = {
    "same": ("", (6, 10), (6, 10), lambda a: a),
    "transposed": ("v w -> w v", (12, 10), (10, 12), lambda a: a.T),
    "into heads": (
        "(h d) w -> w h d",
        (24, 10),
        (10, 8, 3),
        lambda a: a.reshape(8, 3, 10).transpose(2, 0, 1),
    ),
    "out of heads": ("w (h d) -> h d w", (10, 24), (8, 3, 10), lambda a: a.T.reshape(8, 3, 10)),
    "a bias of heads": ("(h d) -> h d", (24,), (8, 3), lambda a: a.reshape(8, 3)),
    "patches": (
        "w c p q -> (p q c) w",
        (10, 3, 2, 2),
        (12, 10),
        lambda a: a.transpose(2, 3, 1, 0).reshape(12, 10),
    ),
    "one of three in each head": (
        "(h part d) w -> w h d",
        (72, 10),
        (10, 8, 3),
        lambda a: a.reshape(8, 3, 3, 10)[:, 1].transpose(2, 0, 1),
    ),
    "a scalar": ("", (), (), lambda a: a),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "patches": {"sizes": {"c": 3, "p": 2, "q": 2}},
    "one of three in each head": {"sizes": {"part": 3}, "pick": {"part": 1}},
}
"""What a form says besides."""


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def stored(
    folder: pathlib.Path, arrays: dict[str, np.ndarray]
) -> dict[str, stored_tensors.StoredTensor]:
    save_file(arrays, folder / "a.safetensors")
    return read_headers([folder / "a.safetensors"])


@pytest.mark.parametrize("kind", ["HostBuffer", "DeviceBuffer"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("piece", [1, 200, 2**24])
def test_forms_on_a_mesh(
    form: str,
    kind: str,
    piece: int,
    mesh: jax.sharding.Mesh,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two layers of a stack, every axis in turn over `model`, another over `fsdp`."""
    text, shape, target, expected = FORMS[form]
    monkeypatch.setattr(tensors, "HostBuffer", getattr(tensors, kind))
    monkeypatch.setattr(tensors, "PIECE", piece)
    monkeypatch.setattr(tensors, "TILE", (4, 3))
    layers = {f"t{n}": RNG.normal(size=shape).astype(np.float32) for n in range(2)}
    found = stored(tmp_path, layers)
    term = Term("t0", text, **OPTIONS.get(form, {}))
    assert layout(term, target).stored == shape
    sources = {f"layers/{n}/w": (term._replace(name=f"t{n}"),) for n in range(2)}
    whole = np.stack([expected(a) for a in layers.values()])
    for axis in range(len(target)):
        spec = [None] * (len(target) + 1)
        spec[1 + axis] = "model" if target[axis] % 4 == 0 else None
        other = (axis + 1) % len(target)
        spec[1 + other] = spec[1 + other] or ("fsdp" if target[other] % 2 == 0 else None)
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        made = read_sharded(
            found,
            sources,
            {"layers/w": jax.ShapeDtypeStruct((2, *target), np.float32, sharding=sharding)},
        )["layers/w"]
        assert made.sharding == sharding
        np.testing.assert_array_equal(made, whole)


@pytest.mark.parametrize("form", FORMS)
def test_layer_by_layer(form: str, tmp_path: pathlib.Path) -> None:
    text, shape, target, expected = FORMS[form]
    layers = {f"t{n}": RNG.normal(size=shape).astype(np.float32) for n in range(2)}
    sources = {f"layers/{n}/w": (Term(f"t{n}", text, **OPTIONS.get(form, {})),) for n in range(2)}
    targets = {"layers/w": jax.ShapeDtypeStruct((2, *target), np.float32)}
    made = stream_tensors(stored(tmp_path, layers), sources, targets)
    assert [tensor.name for tensor in made] == ["layers/0/w", "layers/1/w"]
    reader = HashingReader()
    for tensor, array in zip(made, layers.values(), strict=True):
        assert tensor.shape == target
        np.testing.assert_array_equal(whole(tensor, reader), expected(array))


def test_types_are_cast(tmp_path: pathlib.Path) -> None:
    values = RNG.normal(size=(300, 70)).astype(np.float32)
    found = stored(
        tmp_path,
        {
            "f32": values,
            "bf16": values.astype(ml_dtypes.bfloat16),
            "f16": values.astype(np.float16),
            "f64": values.astype(np.float64),
        },
    )
    for name in found:
        for dtype in (np.float32, ml_dtypes.bfloat16):
            for form in ("", "a b -> b a"):
                shape = values.shape[::-1] if form else values.shape
                made = read_sharded(
                    found, {"w": (Term(name, form),)}, {"w": jax.ShapeDtypeStruct(shape, dtype)}
                )["w"]
                source = values.astype(stored_tensors.DTYPES[found[name].dtype]).astype(dtype)
                assert made.dtype == dtype
                np.testing.assert_array_equal(made, source.T if form else source)


def test_rows_and_sums(tmp_path: pathlib.Path) -> None:
    table, token = (
        RNG.normal(size=(10, 4)).astype(np.float32),
        RNG.normal(size=4).astype(np.float32),
    )
    found = stored(tmp_path, {"table": table, "token": token})
    sources = {
        "token": (Term("token"), Term("table", "n w -> (n w)", {"n": 1}, taken=1)),
        "grid": (Term("table", "(r s) w -> r s w", first=1),),
        "middle": (Term("table", "(h d) w -> w h d", first=2, taken=6),),
    }
    made = read_sharded(
        found,
        sources,
        {
            "token": jax.ShapeDtypeStruct((4,), jnp.float32),
            "grid": jax.ShapeDtypeStruct((3, 3, 4), jnp.float32),
            "middle": jax.ShapeDtypeStruct((4, 2, 3), jnp.float32),
        },
    )
    np.testing.assert_array_equal(made["token"], token + table[0])
    np.testing.assert_array_equal(made["middle"], table[2:8].T.reshape(4, 2, 3))
    np.testing.assert_array_equal(made["grid"], table[1:].reshape(3, 3, 4))


def test_damage_is_named(tmp_path: pathlib.Path) -> None:
    found = stored(tmp_path, {"w": np.zeros((50, 50), np.float32)})
    file = tmp_path / "a.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="a.safetensors is no whole safetensors file"):
        read_headers([file])
    with pytest.raises(UserError, match="a.safetensors ends too early: copy it again"):
        read_sharded(found, {"w": (Term("w"),)}, {"w": jax.ShapeDtypeStruct((50, 50), np.float32)})
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="no whole safetensors file"):
        read_headers([file])
    file.write_bytes(content)
    (tmp_path / "b.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is both in"):
        read_headers([file, tmp_path / "b.safetensors"])
