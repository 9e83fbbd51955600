"""Every kind of damage is found and its file named."""

import hashlib
import pathlib
from collections.abc import Callable

import pytest

from flamingo_jax.checkpointing import manifest


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "d").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "d" / "empty").write_bytes(b"")
    (tmp_path / "d" / "x").write_bytes(bytes(range(256)) * 9)
    manifest.write_manifest(tmp_path)
    return tmp_path


def flip(path: pathlib.Path, place: int = 5) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1
    path.write_bytes(content)


def test_a_whole_folder_passes(folder: pathlib.Path) -> None:
    listing = manifest.read_manifest(folder)
    assert set(listing.files) == {"a.json", "d/empty", "d/x"}
    assert listing.files["d/x"] == (256 * 9, hashlib.sha256(bytes(range(256)) * 9).hexdigest())
    manifest.check_digests(folder, listing)
    (folder / "a note of the user").write_text("is no damage")
    manifest.check_digests(folder, listing)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("d/x", flip),
        ("a.json", flip),
        ("d/x", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("d/empty", lambda path: path.write_bytes(b"x")),
        ("d/empty", pathlib.Path.unlink),
    ],
)
def test_damage_is_found_and_named(
    folder: pathlib.Path, file: str, damage: Callable[[pathlib.Path], None]
) -> None:
    damage(folder / file)
    with pytest.raises(manifest.DamageError, match=file) as caught:
        manifest.check_digests(folder, manifest.read_manifest(folder))
    assert caught.value.file == file


def test_any_flipped_byte_of_the_manifest_itself_is_found(folder: pathlib.Path) -> None:
    path = folder / manifest.NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        flip(path, place)
        with pytest.raises(manifest.DamageError, match=manifest.NAME):
            manifest.read_manifest(folder)
        path.write_bytes(whole)
    manifest.read_manifest(folder)


def test_no_manifest_is_told_apart_from_a_damaged_one(folder: pathlib.Path) -> None:
    (folder / manifest.NAME).unlink()
    with pytest.raises(FileNotFoundError):
        manifest.read_manifest(folder)
