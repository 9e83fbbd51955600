"""What cannot be read just now is read again and never taken for damaged, nothing read under an
error is kept, and damage is masked where it is met.
"""

import errno
import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from data_pipelines import shard_files
from data_pipelines.batches import make_held_out, make_iterator
from data_pipelines.open_files import OpenFiles
from data_pipelines.records import RecordCache, open_records
from data_pipelines.transforms.lengths import measure
from flamingo_jax import storage
from flamingo_jax.errors import EXIT_SAVE_FAILED, StorageError, UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.processing.images import ImageError, decode
from flamingo_jax.processing.tokenizer import Tokenizer
from tests.data_pipelines.faults import (
    Faults,
    build,
    ever,
    hurt,
    never,
    noise,
    now_and_then,
    told,
)
from tests.data_pipelines.toy_data import (
    READERS,
    same,
    take,
)
from tests.processes import one_device

COUNT = 40


TASKS = {
    "text": "language_modelling",
    "pairs": "flamingo",
    "pages": "flamingo",
    "videos": "flamingo",
    "questions": "contrastive",
}


def iterator(folder: pathlib.Path, kind: str, tokenizer: Tokenizer, task: str = "", **options):
    dataset = DatasetConfig(
        kind=kind, path=str(folder), batch_size=4, max_length=64, visuals=0 if kind == "text" else 2
    )
    options = {"cache_bytes": 0, "text_length": 24, "task": task or TASKS[kind]} | options
    return make_iterator(dataset, tokenizer=tokenizer, image_size=8, **options)


def raised(call) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_the_storage_is_told_from_damage_in_the_words_of_array_record(tmp_path, monkeypatch):
    folder = build(tmp_path, "pairs", 12, monkeypatch)
    (file,) = folder.glob("*.array_record*")
    missing = raised(lambda: shard_files._open(str(tmp_path / "none")))
    assert storage.storage_failure(missing).errno == errno.ENOENT
    # The descriptor is closed beneath the reader, as a server that forgot it would have it.
    reader = array_record_module.ArrayRecordReader(
        str(file), options=shard_files.OPTIONS, file_reader_buffer_size=512
    )
    number = next(
        int(fd.name)
        for fd in pathlib.Path("/proc/self/fd").iterdir()
        if os.path.realpath(fd) == str(file.resolve())
    )
    os.close(number)
    stale = raised(lambda: [reader.read([place]) for place in range(12)])
    failure = storage.storage_failure(stale)
    assert failure.errno == errno.EBADF
    assert str(told(errno.EBADF, str(file))).split(";")[:2] == str(stale).split(";")[:2], (
        "the tests' faults speak as real ones do"
    )
    taken = os.open(os.devnull, os.O_RDONLY)  # What the reader will close.
    assert taken <= number

    place, _ = hurt(folder, "pairs")
    damaged = raised(lambda: shard_files._read(str(file), place))
    assert "Corrupted" in str(damaged) or "mismatch" in str(damaged)
    assert storage.storage_failure(damaged) is None


@pytest.mark.parametrize(
    "error, is_storage",
    [
        (OSError(errno.EIO, "x"), True),
        (OSError(errno.ESTALE, "x"), True),
        (OSError(errno.EMFILE, "x"), True),
        (TimeoutError("slow"), True),
        (PermissionError(errno.EACCES, "x"), True),
        (ConnectionResetError("gone"), True),
        (told(errno.ETIMEDOUT, "a; b"), True),
        (OSError("image file is truncated"), False),
        (gzip.BadGzipFile("x"), False),
        (zipfile.BadZipFile("x"), False),
        (EOFError("x"), False),
        (ValueError("it has no id"), False),
        (RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch"), False),
        (RuntimeError("index 1000 out of bound 200"), False),
        (StorageError("told already"), False),
    ],
)
def test_every_error_is_of_the_storage_or_of_the_bytes(error, is_storage):
    assert (storage.storage_failure(error) is not None) is is_storage
    wrapped = ValueError("could not parse it")
    wrapped.__cause__ = error
    assert (storage.storage_failure(wrapped) is not None) is is_storage


def test_reading_again_waits_longer_each_time_and_ends(monkeypatch):
    waited = []
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    calls = iter([OSError(errno.EIO, "x"), OSError(errno.ESTALE, "x"), b"data"])

    def read():
        if isinstance(made := next(calls), Exception):
            raise made
        return made

    assert storage.read_with_retries(read, "it") == b"data" and waited == list(storage.WAITS[:2])
    waited.clear()

    def fail():
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a/b")

    with pytest.raises(
        StorageError,
        match=(
            r"it could not be read 5 times over 10.6 s \(Input/output error\): mend the storage"
        ),
    ) as caught:
        storage.read_with_retries(fail, "it")
    assert (
        caught.value.exit_code == EXIT_SAVE_FAILED
        and waited == list(storage.WAITS) == sorted(waited)
        and sum(waited) < 30
    )
    with pytest.raises(StorageError, match="ulimit -n"):
        storage.read_with_retries(
            lambda: (_ for _ in ()).throw(OSError(errno.EMFILE, "too many")), "it"
        )
    waited.clear()
    with pytest.raises(ValueError, match="wrong"):
        storage.read_with_retries(lambda: (_ for _ in ()).throw(ValueError("wrong")), "it")
    assert not waited


@pytest.mark.parametrize("kind", TASKS)
def test_a_run_over_storage_that_fails_for_moments_has_the_same_batches(
    kind,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    """Whatever is read: lengths, records and held-out batches, in the threads that make batches
    too.
    """
    folder = build(tmp_path, kind, COUNT, monkeypatch, per_shard=7)

    def fixed():
        return make_held_out(
            DatasetConfig(
                kind=kind,
                path=str(folder),
                batch_size=4,
                max_length=64,
                visuals=0 if kind == "text" else 2,
            ),
            tokenizer=tokenizer,
            task=TASKS[kind],
            batches=2,
            image_size=8,
            text_length=24,
        )

    whole, seen = take(iterator(folder, kind, tokenizer), 9), list(fixed())
    kept = {path.name: path.read_bytes() for path in folder.glob("lengths_*")}
    for path in folder.glob("lengths_*"):
        path.unlink()
    faults = Faults(monkeypatch, now_and_then())
    it = iterator(folder, kind, tokenizer, readers=READERS)
    for first, second in zip(whole, take(it, 9), strict=True):
        same(first, second)
    for first, second in zip(seen, fixed(), strict=True):
        same(first, second)
    assert it.summary()["failed"] == [] and faults.failed >= 10
    with (
        np.load(next(folder.glob("lengths_*"))) as again,
        np.load(io.BytesIO(next(iter(kept.values())))) as before,
    ):
        assert not again["damaged"].any()
        for name in before:
            np.testing.assert_array_equal(again[name], before[name])


@pytest.mark.parametrize("kind", ["text", "pairs"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_storage_that_fails_for_long_ends_the_run_and_leaves_nothing(
    kind,
    number,
    tokenizer,
    tmp_path,
    monkeypatch,
):
    """Started again it has the same batches: no length was measured of what could not be read."""
    folder = build(tmp_path, kind, COUNT, monkeypatch)
    faults = Faults(monkeypatch, never)
    whole = take(iterator(folder, kind, tokenizer), 4)
    (lengths,) = folder.glob("lengths_*")
    lengths.unlink()
    # At the first record, in the midst of measuring.
    for begin in (1, 17):
        faults.plan = lambda read, record, begin=begin + faults.reads: (
            number if read >= begin else None
        )
        with pytest.raises(StorageError, match="could not be read 3 times"):
            iterator(folder, kind, tokenizer)
        assert not list(folder.glob("*lengths_*"))
    faults.plan = never
    for first, second in zip(whole, take(iterator(folder, kind, tokenizer), 4), strict=True):
        same(first, second)
    # In a thread that makes batches.
    it = iterator(folder, kind, tokenizer, readers=READERS)
    faults.plan = ever(number)
    with pytest.raises(StorageError, match="could not be read 3 times"):
        for _ in range(50):
            next(it)
    assert it.summary()["failed"] == []
    it.close()


def test_a_dataset_that_lacks_files_is_refused(tmp_path, monkeypatch):
    folder = build(tmp_path, "text", COUNT, monkeypatch, per_shard=10)
    first, *_, last = sorted(folder.glob("*.array_record*"))
    last.unlink()
    with pytest.raises(
        UserError,
        match=(
            f"1 of the 4 files of {folder} train are missing, such as {last}: copy the dataset"
            " again"
        ),
    ):
        open_records(folder, "train", "text")
    first.unlink()
    with pytest.raises(UserError, match="2 of the 4 files"):
        open_records(folder, "train")


def test_an_image_that_the_system_could_not_read_is_no_bad_image(monkeypatch):
    for number in (errno.EMFILE, errno.EIO):
        monkeypatch.setattr(
            Image,
            "open",
            lambda data, number=number: (_ for _ in ()).throw(OSError(number, "x")),
        )
        with pytest.raises(OSError):
            decode(noise(1), 8)
    monkeypatch.setattr(
        Image, "open", lambda data: (_ for _ in ()).throw(OSError("image file is truncated"))
    )
    with pytest.raises(ImageError):
        decode(noise(1), 8)


def test_80_shards_are_read_whole_under_a_low_limit_of_open_files(tokenizer, tmp_path, monkeypatch):
    """Which cannot be raised here: 64 more than there are; one in four of all may be shards."""
    resource = pytest.importorskip("resource")
    folder = build(tmp_path, "text", 160, monkeypatch, per_shard=2)
    assert len(list(folder.glob("*.array_record*"))) == 80
    whole = [
        record["text"]
        for record in map(open_records(folder, "train", "text").__getitem__, range(160))
    ]
    monkeypatch.setattr(shard_files, "READERS", OpenFiles(shard_files._open))
    held = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 64, hard))
    spare = []
    try:
        opened = open_records(folder, "train", "text")
        assert [opened[place]["text"] for place in range(160)] == whole
        assert len(shard_files.READERS) <= (held + 64) // 4
        # Others take what is left, but for a few: shards give way.
        while True:
            try:
                spare.append(open(os.devnull))  # noqa: SIM115
            except OSError:
                break
        assert [opened[place]["text"] for place in reversed(range(160))] == whole[::-1]
        assert len(measure(opened, "text", tokenizer).tokens) == 160
    finally:
        for file in spare:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_readers_are_closed_when_they_are_let_go(tmp_path, monkeypatch):
    folder = build(tmp_path, "text", 20, monkeypatch, per_shard=2)
    monkeypatch.setattr(shard_files, "READERS", OpenFiles(shard_files._open))
    before = len(os.listdir("/proc/self/fd"))
    records = RecordCache(open_records(folder, "train", "text"), "text", 8, cache_bytes=0)
    assert len({records[place].id for place in range(20)}) == 20
    assert len(os.listdir("/proc/self/fd")) - before == len(shard_files.READERS) == 10
    for path in sorted(folder.glob("*.array_record*")):
        shard_files.READERS.forget(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch):
    resource = pytest.importorskip("resource")
    limits = [256, 4_096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(
        resource, "setrlimit", lambda kind, values: limits.__setitem__(slice(None), values)
    )
    storage.raise_open_files()
    assert limits == [4_096, 4_096] and storage.open_files_allowed() == 4_096
    limits[:] = [1_024, resource.RLIM_INFINITY]
    storage.raise_open_files()
    assert limits == [storage.OPEN_FILES, resource.RLIM_INFINITY]
    limits[:] = [1 << 20, 1 << 20]
    storage.raise_open_files()
    assert limits == [1 << 20, 1 << 20], "it is never lowered"


def test_a_dataset_that_was_built_anew_is_read_anew(tmp_path, monkeypatch):
    """Though its files have the names of those that are still open."""
    folder = build(tmp_path, "text", 10, monkeypatch)
    assert open_records(folder, "train", "text")[3]["text"]
    other = build(tmp_path / "other", "text", 12, monkeypatch)
    for path in other.iterdir():
        path.replace(folder / path.name)
    again = open_records(folder, "train", "text")
    assert len(again) == 12 and {again[place]["id"] for place in range(12)} == {
        f"text{number}".encode() for number in range(12)
    }


@pytest.mark.scale
def test_1200_shards_and_150000_kept_features_are_read_whole_with_1024_open_files(tmp_path):
    """In a process that cannot raise its limit."""
    command = (
        f"ulimit -n 1024 && exec {sys.executable} -m tests.data_pipelines.many_files {tmp_path}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env=one_device(),
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    met = json.loads(done.stdout)
    assert (met["shards"], met["records"], met["features"], met["parts"], met["failed"]) == (
        1_200,
        150_000,
        150_000,
        1_500,
        0,
    ), met
    assert met["allowed"] == 1_024 and met["open"] < 600, met
    assert "damaged" not in done.stderr
