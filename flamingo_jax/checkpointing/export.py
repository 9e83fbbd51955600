"""Writes and reads exports: a model as one self-contained folder of sharded safetensors,
config.json, the tokenizer and a manifest.

A stack of layers has one tensor per layer on disk
(`language_model/layers/12/attention/query`), which are stacked again when read. Nothing in the
folder is pickled.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.stored_tensors import (
    DTYPES,
    StoredTensor,
    Term,
    read_headers,
    read_whole,
)
from flamingo_jax.checkpointing.tensors import read_sharded
from flamingo_jax.checkpointing.verification import verify
from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.json_lines import read_bytes
from flamingo_jax.processing.tokenizer import FILE_NAME, JSON_NAME, SPECIALS_NAME, Tokenizer
from flamingo_jax.processing.tokenizer import tokenizer_file as find_tokenizer
from flamingo_jax.pytrees import restack, stacked_name, unstack_names

FORMAT = "flamingo_jax"
VERSION = 1
KINDS = ("contrastive", "language_model", "vision_encoder", "flamingo")
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
BEGUN = ".export-begun"
"""The first file of an export in a bucket: marks a folder without a manifest as an unfinished
export, which may be removed."""


def export_model(
    folder: pathlib.Path | str,
    *,
    kind: str,
    config: dict[str, Any],
    parameters: Mapping[str, Any] | Iterable[tuple[str, np.ndarray]],
    tokenizer_file: pathlib.Path | str | None = None,
    extra_files: Mapping[str, pathlib.Path | str] | None = None,
    shard_bytes: int = 2_000_000_000,
) -> None:
    """Writes an export folder atomically: it appears complete or not at all.

    Args:
      folder: must not exist yet.
      kind: one of KINDS.
      config: the model's config, JSON-able.
      parameters: {flat stacked name: array of any dtype}, each fully addressable from this
        process; or an iterable of (per-layer name, array).
      tokenizer_file: a SentencePiece model, copied as tokenizer.model, or a tokenizer.json,
        copied with the special tokens that go with it.
      extra_files: further files to copy, {name in the folder: path}.
      shard_bytes: the largest size of one safetensors file; a larger array gets a file of its
        own.
    Raises: UserError when the folder exists, a file is missing or the storage cannot be
      written.
    """
    folder = paths.as_path(folder).absolute()
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    if _is_taken(folder):
        raise UserError(f"{folder} is there already: name another folder or remove it")
    copies = {name: paths.as_path(path) for name, path in (extra_files or {}).items()}
    taken = {CONFIG, INDEX, FILE_NAME, JSON_NAME, SPECIALS_NAME, manifest.NAME} & set(copies)
    if taken:
        raise ValueError(f"extra_files may not be named {taken}: the export itself writes that")
    tokenizer = None if tokenizer_file is None else paths.as_path(tokenizer_file)
    for path in (*copies.values(), *([tokenizer] if tokenizer else [])):
        if not path.is_file():
            raise UserError(f"{path} is missing, but the export should hold a copy of it")
    written: dict[str, bytes] = {}
    if tokenizer is not None:
        written = (
            Tokenizer.load(tokenizer).files()
            if tokenizer.suffix == ".json"
            else {FILE_NAME: tokenizer.read_bytes()}
        )
    document = {"format": FORMAT, "version": VERSION, "kind": kind, "config": config}
    written[CONFIG] = (json.dumps(document, indent=2) + "\n").encode()

    in_bucket = paths.is_bucket(folder)
    target = folder if in_bucket else folder.with_name(manifest.unfinished(folder.name))
    try:
        _begin(target)
        _write_shards(target, parameters, shard_bytes)
        for name, data in written.items():
            (target / name).write_bytes(data)
        for name, path in copies.items():
            paths.make_folder((target / name).parent)
            _copy(path, target / name)
        manifest.write_manifest(target)
        if not in_bucket:
            target.rename(folder)
            manifest.sync_folder(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        if not in_bucket:
            shutil.rmtree(target, ignore_errors=True)
        raise UserError(f"{folder} could not be written: {error}") from error


def _is_taken(folder: pathlib.Path) -> bool:
    """Checks whether the folder exists; an unfinished export in a bucket does not count."""
    if not paths.is_bucket(folder):
        return folder.exists()
    files = {file.name for file in paths.files_below(folder)}
    return bool(files) and (manifest.NAME in files or BEGUN not in files)


def _copy(path: pathlib.Path, target: pathlib.Path) -> None:
    if not paths.is_bucket(path) and not paths.is_bucket(target):
        shutil.copyfile(path, target)
    else:
        target.write_bytes(read_bytes(path))


def _begin(folder: pathlib.Path) -> None:
    """Empties the folder to write to, which can only hold an unfinished export."""
    if not paths.is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return
    if manifest.is_there(folder / BEGUN):
        paths.remove_folder(folder)
    (folder / BEGUN).write_text("its export has begun; it is whole once manifest.json is there\n")


def _write_shards(
    folder: pathlib.Path,
    parameters: Mapping[str, Any] | Iterable[tuple[str, np.ndarray]],
    shard_bytes: int,
) -> None:
    """Writes the safetensors files and their index. For a bucket, each file is written on this
    machine first and then uploaded.
    """
    places: list[list[str]] = []
    total = 0
    layers = _layers(parameters) if isinstance(parameters, Mapping) else parameters
    weight_map: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as local:
        for number, shard in enumerate(_shards(layers, shard_bytes)):
            places.append(list(shard))
            total += sum(value.nbytes for value in shard.values())
            if paths.is_bucket(folder):
                name = f"model-{number + 1:05d}.safetensors"
                file = pathlib.Path(local, name)
                save_file(shard, file, metadata={"format": "np"})
                paths.upload(file, folder / name)
                file.unlink()
                weight_map |= dict.fromkeys(shard, name)
            else:
                save_file(shard, folder / f"{number}.safetensors", metadata={"format": "np"})
    # The number of files, which is part of their names, is known only now. Files in a bucket
    # cannot be renamed, so their names do not contain it.
    for number, names in enumerate([] if paths.is_bucket(folder) else places):
        final = f"model-{number + 1:05d}-of-{len(places):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _layers(parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (per-layer name, array), with one stack at a time in host memory."""
    for name in sorted(parameters):
        value = parameters[name]
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            raise ValueError(f"{name} lies partly on other processes: gather it before the export")
        yield from unstack_names({name: np.asarray(value)}).items()


def _shards(
    layers: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Groups arrays into files of at most `shard_bytes`."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for leaf, array in layers:
        array = np.asarray(array, order="C")
        # Start another file when this array would not fit; a larger one gets a file of its
        # own.
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[leaf] = array
        size += array.nbytes
    yield shard


@dataclasses.dataclass(frozen=True)
class Export:
    """Reads an export folder; arrays stay on disk until they are read."""

    folder: pathlib.Path
    kind: str
    """One of KINDS."""
    config: dict[str, Any]
    tokenizer_file: pathlib.Path | None
    digest: str
    """SHA-256 over the digests of all files: identifies the content of the export."""
    names: tuple[str, ...]
    """Flat stacked names of the parameters, sorted."""
    _files: dict[str, str] = dataclasses.field(repr=False)
    _manifest: manifest.Manifest = dataclasses.field(repr=False)

    @functools.cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        found = read_headers([self.folder / name for name in sorted(set(self._files.values()))])
        lacking = sorted(set(self._files) - set(found))
        if lacking:
            raise UserError(
                f"{self.folder} lacks {lacking[0]}, which its {INDEX} names: copy or export it"
                " again"
            )
        return found

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns {flat stacked name: shape}."""
        # The size of each layer axis is the largest index in the names, plus one.
        counts: dict[str, list[int]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for leaf in self._files:
            name, index = stacked_name(leaf)
            most = counts.setdefault(name, [0] * len(index))
            counts[name] = [max(count, place + 1) for count, place in zip(most, index, strict=True)]
            shapes[name] = self._stored[leaf].shape
        return {name: (*counts[name], *shape) for name, shape in shapes.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Returns {flat stacked name: dtype on disk}."""
        return {
            stacked_name(leaf)[0]: np.dtype(DTYPES[self._stored[leaf].dtype])
            for leaf in self._files
        }

    def read_sharded(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        process_group: ProcessGroup | None = None,
        layers: range | None = None,
    ) -> dict[str, jax.Array]:
        """Reads the parameters named in `targets` ({flat stacked name: shape, dtype,
        sharding}). `tensors.read_sharded` describes how several processes share the reading.

        layers: only these layers of the stacks in `targets`; by default all.

        Raises: UserError when the export does not have the target's shapes, or cannot be read.
        """
        for leaf, tensor in self._stored.items():
            name, index = stacked_name(leaf)
            stack = self.shapes[name]
            if layers is not None and index:
                stack = (len(layers), *stack[1:])
            if name in targets and targets[name].shape != stack:
                raise UserError(
                    f"{self.folder}: {name} is {stack}, but the config makes it"
                    f" {targets[name].shape}: the folder is damaged"
                )
            if name in targets and tensor.shape != targets[name].shape[len(index) :]:
                raise UserError(
                    f"{self.folder}: {leaf} has another shape than the other layers: the folder"
                    " is damaged"
                )
        sources = {leaf: (Term(leaf),) for leaf in self._files}
        return read_sharded(
            self._stored,
            sources,
            targets,
            "" if layers else f"reading {self.folder.name}",
            process_group,
            layers,
        )

    def read(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Reads the parameters whose flat stacked name starts with `prefix`, with layers
        stacked, in the dtype on disk.

        Raises: UserError when a file is missing or damaged, StorageError when one cannot be
          read at the moment.
        """
        if paths.is_bucket(self.folder):
            return self._read_tensors(prefix)
        stacks: dict[str, list[str]] = {}
        for leaf in self._files:
            stack = stacked_name(leaf)[0]
            if stack.startswith(prefix):
                stacks.setdefault(stack, []).append(leaf)
        values: dict[str, np.ndarray] = {}
        opened: dict[str, Any] = {}
        try:
            with contextlib.ExitStack() as files:
                for stack in sorted(stacks):
                    leaves = {}
                    for leaf in stacks[stack]:
                        file = self._files[leaf]
                        if file not in opened:
                            manifest.require_readable(self.folder / file)
                            opened[file] = files.enter_context(
                                safetensors.safe_open(self.folder / file, framework="numpy")
                            )
                        leaves[leaf] = opened[file].get_tensor(leaf)
                    values |= restack(leaves)
        except (FileNotFoundError, ValueError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{self.folder} cannot be read ({error}): copy or export it again"
            ) from error
        except OSError as error:
            raise manifest.unreadable(self.folder, error) from error
        return values

    def _read_tensors(self, prefix: str) -> dict[str, np.ndarray]:
        """Does what `read` does in a bucket, with byte ranges, since safetensors reads only
        disks.
        """
        try:
            leaves = {
                leaf: manifest.retry_read(lambda leaf=leaf: read_whole(self._stored[leaf]))  # type: ignore[misc]
                for leaf in self._files
                if stacked_name(leaf)[0].startswith(prefix)
            }
        except EOFError as error:
            raise UserError(f"{error}: copy or export {self.folder} again") from error
        except OSError as error:
            raise manifest.unreadable(self.folder, error) from error
        return restack(leaves)

    def verify(self, process_group: ProcessGroup | None = None) -> None:
        """Compares every byte with the manifest. All processes of a run must call it together
        and share the reading.

        process_group: the processes of the run; by default a `SingleProcess`.

        Raises: UserError naming the first file that differs from what was exported,
          StorageError for one that cannot be read at the moment.
        """
        try:
            verify(self.folder, self._manifest, process_group)
        except manifest.DamageError as error:
            raise UserError(f"{error}: copy or export {self.folder} again") from error
        except OSError as error:
            raise manifest.unreadable(self.folder, error) from error


def open_export(folder: pathlib.Path | str) -> Export:
    """Opens an export folder and checks the size of every file.

    Raises: UserError when the folder is missing, is not an export, or a file of it is missing
      or truncated; StorageError when it cannot be read at the moment.
    """
    folder = paths.as_path(folder)
    try:
        return _opened(folder)
    except OSError as error:
        raise manifest.unreadable(folder, error) from error


def _opened(folder: pathlib.Path) -> Export:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that launch.export wrote")
    try:
        content = json.loads(manifest.retry_read((folder / CONFIG).read_bytes))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        kind, version, config = content["kind"], content["version"], content["config"]
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder} is no export of this project: its {CONFIG} is missing or foreign; name a"
            " folder that launch.export wrote"
        ) from error
    if version != VERSION or kind not in KINDS:
        raise UserError(
            f"{folder} is a {kind!r} export of version {version}, which this version of the"
            " project cannot read: export it again"
        )
    try:
        listing = manifest.read_manifest(folder)
        manifest.check_sizes(folder, listing)
        files = json.loads(manifest.retry_read((folder / INDEX).read_bytes))["weight_map"]
        names = tuple(sorted({stacked_name(leaf)[0] for leaf in files}))
    except manifest.DamageError as error:
        raise UserError(f"{error}: copy or export {folder} again") from error
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} lacks its {manifest.NAME} or {INDEX}: copy or export it again"
        ) from error
    return Export(
        folder, kind, config, find_tokenizer(folder), listing.digest, names, files, listing
    )
