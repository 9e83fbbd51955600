"""Saves and restores the checkpoints of a run: asynchronously, atomically, and verified before
use.

    <folder>/<step>/state/          the arrays, by flat name (`disk_arrays`)
    <folder>/<step>/contents.json   names, dtypes and shapes of the arrays, and the extra data
    <folder>/<step>/manifest.json   size and digest of every file; written last

A step is saved once its manifest exists. The files of a killed save have no manifest: they are
never read, and the next save removes them. In a bucket (`paths`) the arrays are in Zarr's
format (`bucket_arrays`). A folder cannot be renamed there, so the manifest of a damaged step
is renamed to `manifest.json.damaged` instead.
"""

import contextlib
import json
import logging
import pathlib
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from flamingo_jax import paths, renamed
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.bucket_arrays import BucketArrays
from flamingo_jax.checkpointing.contents import (
    dtype_and_shape,
    named_arrays,
    require_same_arrays,
    require_saveable,
)
from flamingo_jax.checkpointing.damaged import DAMAGED, damaged_steps, is_damaged, mark_damaged
from flamingo_jax.checkpointing.disk_arrays import OTHER, DiskArrays
from flamingo_jax.checkpointing.stored_arrays import PARAMETERS
from flamingo_jax.checkpointing.streaming import StreamedTensor
from flamingo_jax.distributed.coordinator import SAVING
from flamingo_jax.distributed.process_group import ProcessGroup, SingleProcess
from flamingo_jax.errors import StorageError, UserError

log = logging.getLogger(__name__)

CONTENTS = "contents.json"
STATE = "state"


class SaveError(StorageError):
    """Signals that a checkpoint could not be written; the ones before it are complete."""


class FoundCheckpoint(NamedTuple):
    """Holds the result of a search in a folder of checkpoints.

    step: the newest complete step, None if there is none. skipped: {a newer step: why it was
    not taken}.
    """

    step: int | None
    skipped: dict[int, str]


class Checkpoints:
    """Saves and restores the checkpoints in one folder.

    Every process of a run makes the same calls in the same order, each from its main thread.

    Args:
      folder: on storage that all processes share; the first save creates it.
      keep_last: how many of the newest steps are kept, at least 1.
      keep_every: steps that are multiples of this are never removed; 0 for none.
      process_group: the processes of the run; by default a `SingleProcess`.
    """

    def __init__(
        self,
        folder: pathlib.Path | str,
        *,
        keep_last: int,
        keep_every: int = 0,
        process_group: ProcessGroup | None = None,
    ):
        if keep_last < 1 or keep_every < 0:
            raise UserError(
                f"keep_last is {keep_last} and keep_every {keep_every}: keep_last should be at"
                " least 1 and keep_every at least 0"
            )
        # orbax wants an absolute path.
        self._folder = paths.as_path(folder).absolute()
        self._in_bucket = paths.is_bucket(self._folder)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._arrays = BucketArrays() if self._in_bucket else DiskArrays()
        self._primary, self._group = jax.process_index() == 0, process_group or SingleProcess()
        self._ending: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None
        self._saved: set[int] = set()
        self._verified: set[int] = set()
        self._verified_parameters: set[int] = set()
        self._cleaned = False

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Begins to save a step and returns as soon as the arrays may be overwritten or
        donated.

        Args:
          state: a pytree of jax.Arrays; pass a PRNG key as its raw data
            (`jax.random.key_data`).
          extra: JSON-able data that belong to this step; those of process 0 are stored.
        Raises: SaveError when this or the previous save failed, UserError for a step that is
          saved already, TypeError for a leaf that cannot be saved.
        """
        arrays = named_arrays(state)
        for name, value in arrays.items():
            require_saveable(name, value)
        contents = {
            "step": step,
            "arrays": {name: dtype_and_shape(value) for name, value in arrays.items()},
            "extra": extra,
        }
        text = json.dumps(contents).encode()

        # One save at a time: the previous one may still be writing in the background.
        self.wait()
        if step in self._saved or self._has_manifest(step):
            raise UserError(
                f"{self._path(step)} is there already: a step is saved once; train in a new"
                " workdir or remove it"
            )
        self._saved.add(step)
        try:
            if self._primary:
                if not self._cleaned:
                    self._remove_leftovers()
                if not self._in_bucket:
                    self._path(step).mkdir(parents=True)
                elif is_damaged(self._path(step)):
                    log.warning("removing %s, which was damaged: saved anew", self._path(step))
                    self._remove(self._path(step))
                # Written first: a folder with this file is recognised as an unfinished save of
                # ours.
                manifest.write_atomically(self._path(step) / CONTENTS, text)
            self._cleaned = True
            # orbax refuses arrays without elements; `restore` makes them from the template.
            self._arrays.save(
                self._path(step) / STATE,
                {name: value for name, value in arrays.items() if value.size},
            )
        except Exception as error:  # noqa: BLE001 - whatever orbax raises, the save has failed
            self._failure = (step, error)
            self._raise_failure()
        # The arrays have been copied to the host; a thread waits for the files and writes the
        # manifest while training goes on.
        self._ending = threading.Thread(target=self._end, args=(step,), name=f"checkpoint-{step}")
        self._ending.start()

    def latest(self) -> int | None:
        """Returns the newest step whose files all agree with its manifest, or None.

        A damaged step is renamed to `<step>.damaged` with a warning, and the one before is
        tried. Reads every byte of the step that it returns.
        Raises: StorageError when the storage cannot be read at the moment; nothing is renamed
          then.
        """
        self.wait()
        self._saved.clear()
        self._verified.clear()
        step = None
        if self._primary:
            with self._reading():
                step = self._find_newest(set_aside=True).step
        if jax.process_count() > 1:
            # Hashing a checkpoint may take longer than the time limit of a collective, so the
            # others wait for process 0 at a barrier without a limit.
            self._group.barrier("the search for the newest checkpoint")
            found = int(
                # -1 stands for no checkpoint, since a collective needs a number.
                multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step))
            )
            step = None if found < 0 else found
        if step is not None:
            self._verified.add(step)
        return step

    def newest(self, *, parameters_only: bool = False) -> FoundCheckpoint:
        """Finds the newest complete step like `latest`, without changing the folder, and also
        returns the steps that were skipped. Only for a single process.

        parameters_only: reads and verifies only what `parameters` and `extra` read; of other
          files, moments among them, only the sizes are compared.
        """
        with self._reading():
            found = self._find_newest(set_aside=False, parameters_only=parameters_only)
            for step, where in damaged_steps(self._folder):
                if step > (found.step or 0):
                    found.skipped.setdefault(step, f"it was damaged and is {where} now")
        if found.step is not None:
            (self._verified_parameters if parameters_only else self._verified).add(found.step)
        return found

    def restore(self, step: int, template: Any) -> Any:
        """Restores a saved state with the structure, shapes, dtypes and shardings of
        `template`, whatever the mesh and the number of processes that saved it.

        Args:
          template: the pytree with a jax.ShapeDtypeStruct for every array; an array without a
            sharding is put on the first local device.
        Raises: UserError when there is no such step, when it is damaged, or when it holds the
          state of another model; StorageError when it cannot be read at the moment.
        """
        self.wait()
        self._require_verified(step)
        wanted = named_arrays(template)
        saved = self._contents(step)["arrays"]
        require_same_arrays(saved, wanted, self._path(step))
        # Targets without a sharding go to the first local device.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding or here)
            for name, like in wanted.items()
            if like.size
        }
        try:
            arrays = self._arrays.restore(self._path(step) / STATE, targets)
        except (OSError, ValueError) as error:
            # The files have just been verified, so this is a read error. tensorstore raises it
            # as a ValueError too, whose message names the file.
            if not isinstance(error, OSError) and str(self._folder) not in str(error):
                raise
            raise manifest.unreadable(self._path(step), error) from error
        for name, like in wanted.items():
            if not like.size:
                arrays[name] = jax.device_put(
                    jnp.zeros(like.shape, like.dtype), like.sharding or here
                )
        return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])

    def parameters(
        self, step: int, targets: Mapping[str, jax.ShapeDtypeStruct]
    ) -> list[StreamedTensor]:
        """Describes parameters of a saved state for reading one layer at a time; moments are
        not read. targets: {name without "trainable/": shape, dtype}.

        Raises: UserError as `restore`.
        """
        if step not in self._verified_parameters:
            self._require_verified(step)
        saved = self._contents(step)["arrays"]
        prefix = f"{PARAMETERS}/"
        require_same_arrays(
            {name: kind for name, kind in saved.items() if name.startswith(prefix)},
            {prefix + name: target for name, target in targets.items()},
            self._path(step),
        )
        stored = self._arrays.open(self._path(step) / STATE)
        try:
            return stored.stream(targets, prefix)
        except ValueError as error:
            raise manifest.unreadable(self._path(step), error) from error

    def extra(self, step: int) -> dict[str, Any]:
        """Returns the JSON data that were saved with a step, with renamed fields translated.

        Raises UserError when there is no such step or it is damaged.
        """
        self.wait()
        if step not in self._verified_parameters:
            self._require_verified(step)
        return renamed.with_new_names("Checkpoint", self._contents(step)["extra"])

    def wait(self) -> None:
        """Waits until the save in flight, if any, is complete, its manifest included. Raises
        SaveError, once, if it failed."""
        if self._ending is not None:
            self._ending.join()
            self._ending = None
        self._raise_failure()

    def close(self) -> None:
        """Waits, then stops orbax's threads. Raises SaveError like `wait`."""
        try:
            self.wait()
        finally:
            self._arrays.close()

    # -- completing a save, in a thread beside the training loop --

    def _end(self, step: int) -> None:
        began = time.monotonic()
        try:
            self._arrays.wait_until_finished()
            if self._in_bucket and jax.process_count() > 1:
                # The manifest needs the files of all processes; orbax waits for them by
                # itself.
                self._group.barrier(f"{SAVING} the arrays of step {step}")
            if self._primary:
                with self._working(f"{SAVING} step {step}") as progress:
                    manifest.write_manifest(self._path(step), progress)
                log.info("saved step %d in %.1f s", step, time.monotonic() - began)
            # A process that exits earlier would abort the one that still writes the manifest.
            self._group.barrier(f"{SAVING} step {step}")
        except Exception as error:  # noqa: BLE001 - whatever orbax raises, the save has failed
            self._failure = (step, error)
            return
        if self._primary:
            try:
                self._remove_old(step)
            except OSError as error:
                log.warning("an old checkpoint could not be removed: %s", error)

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        (step, error), self._failure = self._failure, None
        self._saved.discard(step)
        with contextlib.suppress(OSError):
            if self._primary and not self._has_manifest(step):
                self._remove(self._path(step))
        reason = getattr(error, "strerror", None) or next(
            iter(str(error).splitlines()), type(error).__name__
        )
        raise SaveError(
            f"step {step} could not be saved in {self._folder} ({reason}): mend the storage and"
            " start again from the step before"
        ) from error

    def _remove_old(self, newest: int) -> None:
        # The step that has just been saved is never removed.
        kept = {newest, *self._steps()[: self._keep_last]}
        for step in self._steps():
            if step not in kept and not (self._keep_every and step % self._keep_every == 0):
                self._remove(self._path(step))

    def _remove_leftovers(self) -> None:
        for path in self._unfinished():
            log.warning("removing %s: its save was never finished", path)
            self._remove(path)

    def _unfinished(self) -> list[pathlib.Path]:
        """Lists the folders of steps without a manifest.

        Raises UserError for a folder that was not begun by `save`: it may be somebody's work.
        """
        steps = [step for step in sorted(self._folders()) if not self._has_manifest(step)]
        found = [self._path(step) for step in steps]
        for path in list(found):
            try:
                inside = {part.name for part in path.iterdir()}
            except FileNotFoundError:
                # A run that is still training has just removed it.
                continue
            if DAMAGED in inside:
                found.remove(path)
                continue
            if inside and CONTENTS not in inside and inside != {manifest.unfinished(CONTENTS)}:
                raise UserError(f"{path} is no checkpoint of this project: train in a new workdir")
        return found

    @staticmethod
    def _remove(path: pathlib.Path) -> None:
        """Removes a checkpoint, the manifest first and `contents.json` last: what a kill
        leaves in between is not a checkpoint any more, but is still recognised as one of ours.
        """
        (path / manifest.NAME).unlink(missing_ok=True)
        for name in paths.subfolders(path):
            with contextlib.suppress(OSError):
                paths.remove_folder(path / name)
        with contextlib.suppress(*((FileNotFoundError,) if paths.is_bucket(path) else ())):
            paths.remove_folder(path)

    # -- finding and checking --

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / str(step)

    def _folders(self) -> list[int]:
        """Lists the steps that have a folder, newest first. Raises OSError for a folder that
        cannot be listed: a run that took this for "no checkpoint" would start from scratch.
        """
        try:
            names = manifest.retry_read(lambda: paths.subfolders(self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        steps = [int(name) for name in names if name.isdecimal() and name == str(int(name))]
        return sorted(steps, reverse=True)

    def _has_manifest(self, step: int) -> bool:
        return manifest.is_there(self._path(step) / manifest.NAME)

    def _steps(self) -> list[int]:
        """Lists the steps that have a manifest, newest first."""
        return [step for step in self._folders() if self._has_manifest(step)]

    def _find_newest(self, *, set_aside: bool, parameters_only: bool = False) -> FoundCheckpoint:
        """Finds the newest complete checkpoint.

        Raises OSError for a read error, which is not damage: only different bytes are.
        """
        skipped = {int(path.name): "its save was not finished" for path in self._unfinished()}
        for step in skipped:
            log.warning("passing over %s: %s", self._path(step), skipped[step])
        for step in self._steps():
            damage = self._damage(step, parameters_only)
            if damage is None:
                return FoundCheckpoint(
                    step, {other: why for other, why in skipped.items() if other > step}
                )
            if not self._has_manifest(step):
                # A run that is still training has just removed it.
                continue
            skipped[step] = f"it is damaged: {damage}"
            where = mark_damaged(self._path(step)) if set_aside else self._path(step)
            log.warning("checkpoint %s is damaged: %s; trying the one before", where, damage)
        return FoundCheckpoint(None, skipped)

    def _damage(self, step: int, parameters_only: bool = False) -> str | None:
        """Describes the first difference from the manifest, None if there is none. Raises
        OSError.
        """
        with self._working(f"verifying step {step}") as progress:
            try:
                listing = manifest.read_manifest(self._path(step))
                wanted = set(listing.files)
                if parameters_only:
                    # Earlier versions saved parameters and moments to the same files.
                    other = f"{STATE}/{OTHER}/", f"{STATE}/optimizer/"
                    wanted = {name for name in wanted if not name.startswith(other)}
                manifest.check_digests(
                    self._path(step), listing, progress, wanted=wanted.__contains__
                )
            except (manifest.DamageError, FileNotFoundError) as error:
                return str(error)
        return None

    @contextlib.contextmanager
    def _working(self, what: str) -> Iterator[manifest.Progress]:
        """Yields a function that reports progress to the other processes, so that they
        wait.
        """
        self._group.report_progress(what)
        try:
            yield lambda: self._group.report_progress(what)
        finally:
            self._group.report_progress("")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise manifest.unreadable(self._folder, error) from error

    def _require_verified(self, step: int) -> None:
        if step in self._verified:
            return
        problem = ""
        if self._primary:
            with self._reading():
                exists = self._has_manifest(step)
                damage = self._damage(step) if exists else None
            problem = (
                f"{damage}: use another step"
                if damage
                else ""
                if exists
                else f"{self._folder} has no checkpoint of step {step}"
            )
        if jax.process_count() > 1:
            self._group.barrier(f"the verification of step {step}")
        if jax.process_count() > 1 and int(
            multihost_utils.broadcast_one_to_all(np.int32(bool(problem)))
        ):
            problem = (
                problem
                or f"the checkpoint of step {step} in {self._folder} is missing or damaged: see the"
                " message of process 0"
            )
        if problem:
            raise UserError(problem)
        self._verified.add(step)

    def _contents(self, step: int) -> dict[str, Any]:
        with self._reading():
            return json.loads(manifest.retry_read((self._path(step) / CONTENTS).read_bytes))
