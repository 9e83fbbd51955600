"""Checkpoints are whole or absent, verified before use, and restored into other shardings."""

import errno
import itertools
import logging
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flamingo_jax.checkpointing import checkpoints as checkpointing
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.checkpoints import Checkpoints, SaveError
from flamingo_jax.distributed.process_group import SingleProcess
from flamingo_jax.errors import EXIT_SAVE_FAILED, StorageError, UserError


class State(NamedTuple):
    """The shapes of a training state: a scalar, flat names with slashes, a nested optimizer, a
    key, an empty array.
    """

    step: jax.Array
    trainable: dict[str, jax.Array]
    optimizer: Any
    key: jax.Array


def mesh(devices: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        (devices,),
        ("x",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )


def make_state(step: int, devices: int = 1) -> State:
    split, whole = (jax.NamedSharding(mesh(devices), spec) for spec in (jax.P("x"), jax.P()))
    query = jax.device_put(jnp.arange(64.0).reshape(8, 8) + step, split)
    norm = jax.device_put(jnp.full((3,), step, jnp.bfloat16), whole)
    moments = (
        {"count": jax.device_put(jnp.int32(step), whole), "mu": {"a/layers/q": query * 2}},
        (),
        [jax.device_put(jnp.zeros((0, 3)), whole)],
    )
    key = jax.device_put(jax.random.key_data(jax.random.key(step)), whole)
    return State(
        jax.device_put(jnp.int32(step), whole),
        {"a/layers/q": query, "a/norm": norm},
        moments,
        key,
    )


def template(state: Any) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def require_equal(found: Any, wanted: Any) -> None:
    assert str(jax.tree.structure(found)) == str(jax.tree.structure(wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def saved(
    folder: pathlib.Path, steps: list[int], keep_last: int = 9, keep_every: int = 0
) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep_last=keep_last, keep_every=keep_every)
    for step in steps:
        checkpoints.save(step, make_state(step), {"position": {"m3w": step * 10}})
    checkpoints.wait()
    return checkpoints


def test_round_trip_with_extra_data(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, [5]).close()
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.latest() == 5
    require_equal(checkpoints.restore(5, template(make_state(0))), make_state(5))
    assert checkpoints.extra(5) == {"position": {"m3w": 50}}


def test_an_empty_or_missing_folder_has_no_latest_and_is_not_made(
    tmp_path: pathlib.Path,
) -> None:
    assert Checkpoints(tmp_path, keep_last=1).latest() is None
    checkpoints = Checkpoints(tmp_path / "nowhere", keep_last=1)
    assert checkpoints.latest() is None and not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        checkpoints.restore(3, template(make_state(0)))


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (8, 1)])
def test_restored_into_another_number_of_devices(
    tmp_path: pathlib.Path, before: int, after: int
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, make_state(1, before), {})
    wanted = make_state(1, after)
    found = checkpoints.restore(1, template(wanted))
    require_equal(found, wanted)
    assert found.trainable["a/layers/q"].sharding == wanted.trainable["a/layers/q"].sharding
    checkpoints.close()


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    advance = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    values = {str(i): jnp.full((256, 256), float(i)) for i in range(16)}
    checkpoints.save(1, values, {})
    for _ in range(10):
        values = advance(values)
    jax.block_until_ready(values)
    require_equal(
        checkpoints.restore(1, template(values)),
        {str(i): jnp.full((256, 256), float(i)) for i in range(16)},
    )
    checkpoints.close()


def test_keep_last_and_keep_every(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, [2, 4, 6, 8, 10], keep_last=2, keep_every=4).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "4", "8"]
    with pytest.raises(UserError, match="keep_last"):
        Checkpoints(tmp_path, keep_last=0)


def test_a_flipped_byte_in_any_file_of_the_newest_is_found_and_the_one_before_is_used(
    tmp_path: pathlib.Path, caplog: Any
) -> None:
    saved(tmp_path, [1]).close()
    for number in itertools.count():
        step = 2 + number
        saved(tmp_path, [step]).close()
        # The names of orbax's data files are random and their number varies by save: the same
        # place in the list stands for the same kind of file.
        files = sorted(path for path in (tmp_path / str(step)).rglob("*") if path.is_file())
        if number >= len(files):
            break
        victim = files[number]
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1 << (number % 8)
        victim.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert Checkpoints(tmp_path, keep_last=1).latest() == 1
        assert str(victim) in caplog.text
        assert (tmp_path / f"{step}.damaged").is_dir() and not (tmp_path / str(step)).exists()
    assert number > 8


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads again at once."""
    monkeypatch.setattr(manifest, "READ_AGAIN_AFTER", (0.0, 0.0, 0.0))


def unreadable(path: pathlib.Path) -> pathlib.Path:
    """In its place a file that the system refuses to open (ELOOP), for root too; returns where
    it is now.
    """
    kept = path.rename(path.with_name("kept elsewhere"))
    path.symlink_to(path)
    return kept


@pytest.mark.parametrize("what", ["data", "contents.json", manifest.NAME, "folder"])
def test_what_cannot_be_read_just_now_is_no_damage(
    what: str, hasty: None, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "checkpoints"
    saved(folder, [1, 2]).close()
    data = max(
        filter(pathlib.Path.is_file, (folder / "2").rglob("*")),
        key=lambda path: path.stat().st_size,
    )
    files = {"folder": folder, "data": data}
    victim = files.get(what, folder / "2" / what)
    kept = unreadable(victim)
    for find in (Checkpoints.latest, Checkpoints.newest):
        with pytest.raises(
            StorageError, match="cannot be read just now .Too many levels"
        ) as caught:
            find(Checkpoints(folder, keep_last=1))
        assert caught.value.exit_code == EXIT_SAVE_FAILED and str(victim) in str(caught.value)
    if what != "folder":
        with pytest.raises(StorageError, match="cannot be read just now"):
            Checkpoints(folder, keep_last=1).restore(2, template(make_state(2)))
    victim.unlink()
    kept.rename(victim)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    checkpoints = Checkpoints(folder, keep_last=1)
    assert checkpoints.latest() == 2
    require_equal(checkpoints.restore(2, template(make_state(2))), make_state(2))


def test_a_storage_that_fails_after_the_check_is_told_too(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, [1]).close()
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert checkpoints.latest() == 1
    for path in list((tmp_path / "1" / "state").rglob("d/*")):
        unreadable(path)
    with pytest.raises(StorageError, match=r"1 cannot be read just now .*Error reading"):
        checkpoints.restore(1, template(make_state(1)))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_an_error_of_the_storage_is_read_again_and_then_told(
    code: int, hasty: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, [1, 2]).close()
    quick, fails = manifest._entry, itertools.count()

    def entry(path: pathlib.Path, *rest: Any, **words: Any) -> manifest.FileDigest:
        if path.name == "contents.json" and next(fails) < most:
            raise OSError(code, os.strerror(code), str(path))
        return quick(path, *rest, **words)

    monkeypatch.setattr(manifest, "_entry", entry)
    most = 3
    assert Checkpoints(tmp_path, keep_last=1).latest() == 2, "it may pass"
    fails, most = itertools.count(), 4
    with pytest.raises(
        StorageError,
        match=rf"2/contents.json cannot be read just now .{os.strerror(code)}.: mend",
    ):
        Checkpoints(tmp_path, keep_last=1).latest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    hasty: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run would begin anew, and cut away what it has measured. Python's own globbing passes
    over such errors.
    """
    saved(tmp_path, [1]).close()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(StorageError, match="cannot be read just now"):
            Checkpoints(tmp_path, keep_last=1).latest()
    assert Checkpoints(tmp_path, keep_last=1).latest() == 1


def test_who_only_reads_changes_nothing_and_is_told_what_is_newer(
    tmp_path: pathlib.Path, caplog: Any
) -> None:
    saved(tmp_path, [1, 2, 3, 4, 5]).close()
    (tmp_path / "1" / manifest.NAME).unlink()
    (tmp_path / "3" / "contents.json").write_text("{}")
    (tmp_path / "4" / manifest.NAME).unlink()
    (tmp_path / "5").rename(tmp_path / "5.damaged")
    before = sorted(path.name for path in tmp_path.iterdir())
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    with caplog.at_level(logging.WARNING):
        step, skipped = checkpoints.newest()
    assert step == 2 and set(skipped) == {3, 4, 5}
    assert (
        "has 2 bytes" in skipped[3] and "not finished" in skipped[4] and "5.damaged" in skipped[5]
    )
    assert f"checkpoint {tmp_path / '3'} is damaged" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    require_equal(checkpoints.restore(2, template(make_state(2))), make_state(2))
    assert Checkpoints(tmp_path / "nowhere", keep_last=1).newest() == (None, {})


class Watched(SingleProcess):
    """What is told of reads and writes, and where all meet."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def report_progress(self, what: str) -> None:
        self.told.append(what)

    def barrier(self, where: str) -> None:
        self.told.append(f"met: {where}")


def test_those_who_wait_are_told_that_it_gets_on(tmp_path: pathlib.Path) -> None:
    """A save ends, for all, when its manifest is there, and what was read last is told of byte
    by byte.
    """
    watched = Watched()
    checkpoints = Checkpoints(tmp_path, keep_last=1, process_group=watched)
    checkpoints.save(1, make_state(1), {})
    checkpoints.close()
    assert watched.told[0] == "saving step 1" and watched.told[-2:] == [
        "",
        "met: saving step 1",
    ]
    files = (
        sum(path.is_file() and path.stat().st_size > 0 for path in (tmp_path / "1").rglob("*")) - 1
    )
    assert watched.told.count("saving step 1") == 1 + files
    watched.told.clear()
    assert Checkpoints(tmp_path, keep_last=1, process_group=watched).latest() == 1
    assert watched.told == ["verifying step 1"] * (1 + files) + [""]


@pytest.mark.parametrize("index", [0, 1])
def test_no_collective_waits_for_the_one_that_reads(
    index: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives have time limits of their own: all meet once it has read, and only then
    broadcast.
    """
    saved(tmp_path, [1]).close()
    watched = Watched()

    def broadcast(value: np.ndarray) -> np.ndarray:
        watched.told.append("broadcast")
        return np.asarray(value if index == 0 else sent)

    checkpoints, again = (
        Checkpoints(tmp_path, keep_last=1, process_group=watched) for _ in range(2)
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpointing.multihost_utils, "broadcast_one_to_all", broadcast)
    checkpoints._primary = again._primary = index == 0
    sent = 1
    assert checkpoints.latest() == 1
    read = [told for told in watched.told if told.startswith("verifying")]
    search = ["met: the search for the newest checkpoint", "broadcast"]
    assert watched.told == [*read, *([""] if index == 0 else []), *search] and bool(read) == (
        index == 0
    )
    watched.told.clear()
    sent = 0
    assert again.extra(1) == {"position": {"m3w": 10}}
    assert watched.told[-2:] == ["met: the verification of step 1", "broadcast"]
    assert any(told.startswith("verifying") for told in watched.told) == (index == 0)


def test_a_damaged_step_may_be_saved_again(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        checkpoints = saved(tmp_path, [3])
        next((tmp_path / "3").rglob("contents.json")).write_text("{}")
        with pytest.raises(UserError, match=r"contents.json has 2 bytes"):
            checkpoints.restore(3, template(make_state(3)))
        assert checkpoints.latest() is None
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "3.damaged", "3.damaged.2"]


def test_a_step_without_a_manifest_is_passed_over_and_removed_by_the_next_save(
    tmp_path: pathlib.Path, caplog: Any
) -> None:
    saved(tmp_path, [1, 2]).close()
    (tmp_path / "2" / manifest.NAME).unlink()
    (tmp_path / "3" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "3" / "contents.json").touch()
    (tmp_path / "notes").mkdir()
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    assert checkpoints.latest() == 1
    assert "passing over" in caplog.text and (tmp_path / "2").exists()
    checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3", "notes"]
    assert checkpoints.latest() == 3


def test_somebody_elses_checkpoints_are_refused_and_stay(tmp_path: pathlib.Path) -> None:
    (tmp_path / "1000" / "default").mkdir(parents=True)
    (tmp_path / "1000" / "_CHECKPOINT_METADATA").write_text("{}")
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    with pytest.raises(UserError, match="1000 is no checkpoint of this project"):
        checkpoints.latest()
    with pytest.raises(UserError, match="1000 is no checkpoint of this project"):
        checkpoints.save(3, make_state(3), {})
    checkpoints.close()
    assert (tmp_path / "1000" / "_CHECKPOINT_METADATA").exists()


def test_another_models_state_is_refused_by_name(tmp_path: pathlib.Path) -> None:
    checkpoints = saved(tmp_path, [1])
    for change, words in (
        (
            lambda t: {"a/layers/q": t["a/layers/q"]},
            "trainable/a/norm is bfloat16 .3. in the checkpoint and absent here",
        ),
        (lambda t: t | {"b": t["a/norm"]}, "trainable/b is absent in the checkpoint"),
        (
            lambda t: t | {"a/norm": jax.ShapeDtypeStruct((4,), jnp.bfloat16)},
            "bfloat16 .3. in the checkpoint and bfloat16 .4. here",
        ),
        (
            lambda t: t | {"a/norm": jax.ShapeDtypeStruct((3,), jnp.float32)},
            "bfloat16 .3. in the checkpoint and float32 .3. here",
        ),
    ):
        other = template(make_state(1))
        with pytest.raises(
            UserError,
            match=f"another model or optimizer: {words}|another model or optimizer: .*{words}",
        ):
            checkpoints.restore(1, other._replace(trainable=change(other.trainable)))


def test_a_step_is_saved_once(tmp_path: pathlib.Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(1, make_state(1), {})
    with pytest.raises(UserError, match="is there already"):
        checkpoints.save(1, make_state(2), {})
    with pytest.raises(UserError, match="is there already"):
        Checkpoints(tmp_path, keep_last=2).save(1, make_state(2), {})
    require_equal(checkpoints.restore(1, template(make_state(1))), make_state(1))


def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path,
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep_last=2)
    with pytest.raises(TypeError, match="key_data"):
        checkpoints.save(1, {"key": jax.random.key(0)}, {})
    with pytest.raises(TypeError, match="extra"):
        checkpoints.save(1, {"n": 3}, {})
    with pytest.raises(TypeError, match="JSON"):
        checkpoints.save(1, make_state(1), {"a": object()})
    assert not (tmp_path / "c").exists()


def test_a_failed_save_is_raised_once_by_the_next_call_and_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, [1])

    def full(folder: pathlib.Path, progress: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_manifest", full)
        checkpoints.save(2, make_state(2), {})
        with pytest.raises(SaveError, match="step 2 could not be saved.*No space left"):
            checkpoints.save(3, make_state(3), {})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    checkpoints.save(2, make_state(2), {})
    assert checkpoints.latest() == 2
    checkpoints.close()


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="step 1 could not be saved"):
        Checkpoints(tmp_path / "file", keep_last=1).save(1, make_state(1), {})
