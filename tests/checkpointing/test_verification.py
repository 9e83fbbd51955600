"""Who hashes which file, and what all learn of it; threads stand in for processes."""

import concurrent.futures
import os
import pathlib
import shutil
import threading

import numpy as np
import pytest

from flamingo_jax.checkpointing import manifest, verification
from flamingo_jax.checkpointing.verification import ProcessExchange, file_digests, partition_by_size
from flamingo_jax.errors import UserError

SIZES = [70_000, 10, 30_000, 20_000, 20_000, 0]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "export").mkdir()
    for place, size in enumerate(SIZES):
        file = tmp_path / "export" / f"{place}.bin"
        file.write_bytes(bytes([place]) * size)
        os.utime(file, (1e9, 1e9))
    return tmp_path / "export"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """The files that were read, in the order in which they were; nothing is known before."""
    found: list[pathlib.Path] = []
    real = manifest.file_digest

    def entry(file: pathlib.Path, progress: manifest.Progress) -> manifest.FileDigest:
        found.append(file)
        return real(file, progress)

    monkeypatch.setattr(manifest, "file_digest", entry)
    monkeypatch.setattr(verification, "_known", {})
    return found


def ask(*folders: pathlib.Path) -> list[object]:
    """What each of several processes is told of its folder: the entries, or the error."""
    barrier, told = threading.Barrier(len(folders), timeout=20), [np.zeros(0)] * len(folders)

    def one(index: int) -> object:
        def gather(array: np.ndarray) -> np.ndarray:
            told[index] = array
            barrier.wait()
            everything = np.stack(told)
            barrier.wait()
            return everything

        names = sorted(file.name for file in folders[index].iterdir())
        try:
            return file_digests(
                folders[index], names, exchange=ProcessExchange(index, len(folders), gather)
            )
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(one, range(len(folders))))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_files_are_dealt_out_whole_and_evenly(count: int) -> None:
    dealt = partition_by_size(SIZES, count)
    assert sorted(place for places in dealt for place in places) == list(range(len(SIZES)))
    # No one has more than another by more than its largest file.
    loads = [sum(SIZES[place] for place in places) for places in dealt]
    assert max(loads) - min(loads) <= max(SIZES) and partition_by_size(SIZES, count) == dealt


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_file_is_read_once_and_known_to_all(
    count: int, folder: pathlib.Path, hashed: list[pathlib.Path]
) -> None:
    expected = {file.name: manifest._entry(file) for file in folder.iterdir()}
    assert ask(*[folder] * count) == [expected] * count
    assert sorted(hashed) == sorted(folder.iterdir())
    # Nor again in the same start, until one changes.
    assert ask(*[folder] * count) == [expected] * count and len(hashed) == len(SIZES)
    (folder / "0.bin").write_bytes(b"other" * 14_000)
    assert ask(*[folder] * count) != [expected] * count and len(hashed) == 2 * len(SIZES)


def test_a_file_that_has_just_changed_is_read_again(
    folder: pathlib.Path, hashed: list[pathlib.Path]
) -> None:
    """Its time may not show the next change: clocks of file systems are coarse."""
    os.utime(folder / "0.bin")
    assert ask(folder) == ask(folder)
    assert len(hashed) == 2 * len(SIZES)


def test_hosts_with_copies_of_their_own_read_these_and_compare(
    folder: pathlib.Path, tmp_path: pathlib.Path, hashed: list[pathlib.Path]
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    # Two processes to a host.
    first, second, third, fourth = ask(folder, folder, copy, copy)
    assert first == second == third == fourth
    assert sorted(hashed) == sorted([*folder.iterdir(), *copy.iterdir()])
    (copy / "3.bin").write_bytes(bytes(20_000))
    told = ask(folder, folder, copy, copy)
    assert all("3.bin has another content on some hosts than on others" in str(t) for t in told)
    (copy / "3.bin").unlink()
    told = ask(folder, copy)
    assert all("has other files on some hosts than on others" in str(t) for t in told)


def test_damage_is_told_to_all(folder: pathlib.Path, hashed: list[pathlib.Path]) -> None:
    listing = manifest.write_manifest(folder)
    verification.verify(folder, listing)
    (folder / "2.bin").write_bytes(b"\1" * 30_000)
    with pytest.raises(manifest.DamageError, match=r"2\.bin has other content"):
        verification.verify(folder, listing)
