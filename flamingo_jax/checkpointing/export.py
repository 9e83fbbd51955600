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
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.shard_writer import (
    PLAN,
    ExportFile,
    plan_files,
    plan_shards,
    remove_plan,
    write_shards,
)
from flamingo_jax.checkpointing.stored_tensors import DTYPES, StoredTensor, Term, read_headers
from flamingo_jax.checkpointing.streaming import (
    HashingReader,
    StreamedTensor,
    TensorStream,
    stream_arrays,
)
from flamingo_jax.checkpointing.tensor_streams import stream_tensors
from flamingo_jax.checkpointing.tensors import read_sharded
from flamingo_jax.checkpointing.verification import verify
from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.json_lines import read_bytes
from flamingo_jax.processing.tokenizer import FILE_NAME, JSON_NAME, SPECIALS_NAME, Tokenizer
from flamingo_jax.processing.tokenizer import tokenizer_file as find_tokenizer
from flamingo_jax.pytrees import stack_axes, stacked_name

FORMAT = "flamingo_jax"
VERSION = 2
"""Exports that are complete in themselves have version 1."""
KINDS = ("contrastive", "language_model", "vision_encoder", "flamingo")
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CARD = "README.md"


class PartReference(NamedTuple):
    """Names a frozen part that an export does not contain.

    folder: where it was in training, a published model or an export. digest: of its weights
      there. dtype: of its parameters in training, "" for the one on disk.
    """

    folder: str
    digest: str
    dtype: str = ""


def export_model(
    folder: pathlib.Path | str,
    *,
    kind: str,
    config: dict[str, Any],
    parameters: Mapping[str, Any] | TensorStream,
    tokenizer_file: pathlib.Path | str | None = None,
    extra_files: Mapping[str, pathlib.Path | str] | None = None,
    card: str = "",
    parts: Mapping[str, PartReference] | None = None,
    lora: Mapping[str, Any] | None = None,
    shard_bytes: int = 1_000_000_000,
) -> None:
    """Writes an export folder atomically: it appears complete or not at all.

    Host memory holds a piece of a tensor at a time. If the parameters are a stream whose
    identity is known, what a killed export has written is kept until the same export is made
    again, which continues it.

    Args:
      folder: must not exist yet.
      kind: one of KINDS.
      config: the model's config, JSON-able.
      parameters: {flat stacked name: array of any dtype}, each fully addressable from this
        process; or a stream of tensors with per-layer names.
      tokenizer_file: a SentencePiece model, copied as tokenizer.model, or a tokenizer.json,
        copied with the special tokens that go with it.
      extra_files: further files to copy, {name in the folder: path}.
      card: the text of the model card, written as README.md; "" for none.
      parts: frozen parts that are not among the parameters, {part: where they are}.
      lora: the LoRAConfig as JSON, where the parameters hold updates of a part that is not
        among them.
      shard_bytes: the largest size of one safetensors file; a larger tensor gets a file of its
        own.
    Raises: UserError when the folder exists, a file is missing or the storage cannot be
      written; what reading the stream raises.
    """
    folder = paths.as_path(folder).absolute()
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, not one of {', '.join(KINDS)}")
    require_free(folder)
    copies = {name: paths.as_path(path) for name, path in (extra_files or {}).items()}
    taken = {CONFIG, INDEX, CARD, FILE_NAME, JSON_NAME, SPECIALS_NAME, manifest.NAME} & set(copies)
    if taken:
        raise ValueError(f"extra_files may not be named {taken}: the export itself writes that")
    tokenizer = None if tokenizer_file is None else paths.as_path(tokenizer_file)
    for path in (*copies.values(), *([tokenizer] if tokenizer else [])):
        if not path.is_file():
            raise UserError(f"{path} is missing, but the export should hold a copy of it")
    document: dict[str, Any] = {"format": FORMAT, "version": 1, "kind": kind, "config": config}
    if parts:
        # Earlier versions of the project cannot read it, and say so by its version.
        references = {name: reference._asdict() for name, reference in parts.items()}
        document |= {"version": VERSION, "parts": references, "lora": dict(lora or {})}
    written = {CONFIG: (json.dumps(document, indent=2) + "\n").encode()}
    if tokenizer is not None:
        written |= (
            Tokenizer.load(tokenizer).files()
            if tokenizer.suffix == ".json"
            else {FILE_NAME: tokenizer.read_bytes()}
        )
    if card:
        written[CARD] = card.encode()
    stream = stream_arrays(parameters) if isinstance(parameters, Mapping) else parameters
    _write(folder, stream, plan_shards(stream.tensors, shard_bytes), document, written, copies)


def _write(
    folder: pathlib.Path,
    stream: TensorStream,
    shards: Sequence[ExportFile],
    document: Mapping[str, Any],
    written: Mapping[str, bytes],
    copies: Mapping[str, pathlib.Path],
) -> None:
    """Writes all files of an export, and then commits it."""
    in_bucket = paths.is_bucket(folder)
    target = folder if in_bucket else folder.with_name(manifest.unfinished(folder.name))
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(shard.bytes for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    try:
        digests = write_shards(target, shards, stream, document)
        (target / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        for name, data in written.items():
            (target / name).write_bytes(data)
        for name, path in copies.items():
            paths.make_folder((target / name).parent)
            _copy(path, target / name)
        plan = {path.name for path in plan_files(target)}
        manifest.write_manifest(target, known=digests, besides=plan)
        # In a bucket the manifest is the commit.
        remove_plan(target)
        if not in_bucket:
            target.rename(folder)
            manifest.sync_folder(folder.parent)
    except OSError as error:
        kept = ""
        if stream.identity:
            kept = "; what is written is kept, and the same command continues it"
        elif not in_bucket:
            shutil.rmtree(target, ignore_errors=True)
        raise UserError(f"{folder} could not be written: {error}{kept}") from error


def require_free(folder: pathlib.Path) -> None:
    """Raises UserError where the folder of an export exists; an unfinished export in a bucket
    does not count.
    """
    if not paths.is_bucket(folder):
        taken = folder.exists()
    else:
        files = {file.name for file in paths.files_below(folder)}
        taken = bool(files) and (manifest.NAME in files or PLAN not in files)
    if taken:
        raise UserError(f"{folder} is there already: name another folder or remove it")


def _copy(path: pathlib.Path, target: pathlib.Path) -> None:
    if not paths.is_bucket(path) and not paths.is_bucket(target):
        shutil.copyfile(path, target)
    else:
        target.write_bytes(read_bytes(path))


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
    parts: Mapping[str, PartReference]
    """Frozen parts that are not in the folder: `interop.weight_sources` finds them."""
    lora: Mapping[str, Any]
    """The LoRAConfig of updates of these parts, as JSON; {} for none."""
    _files: dict[str, str] = dataclasses.field(repr=False)
    _manifest: manifest.Manifest = dataclasses.field(repr=False)

    @property
    def files(self) -> Mapping[str, manifest.FileDigest]:
        """Returns {file: size and digest} of all that was exported."""
        return self._manifest.files

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

    def stream(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> list[StreamedTensor]:
        """Describes the parameters in `targets` for reading one layer at a time, cast to the
        targets' dtypes, in the order of the files.
        """
        sources = {leaf: (Term(leaf),) for leaf in self._files}
        return stream_tensors(self._stored, sources, targets)

    def check(self, reader: HashingReader) -> str:
        """Compares the files of all parameters with the manifest, and reads what `reader` has
        not read of them; returns the export's digest.

        Raises: UserError naming the first that differs; StorageError for one that cannot be
          read at the moment.
        """
        with self._reading():
            for name in sorted(set(self._files.values())):
                if reader.digest(self.folder / name) != self._manifest.files.get(name):
                    raise manifest.DamageError(
                        self.folder, name, "has other content than its manifest says"
                    )
        return self.digest

    def read(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Reads the parameters whose flat stacked name starts with `prefix`, with layers
        stacked, in the dtype on disk. Each layer is read straight into its stack.

        Raises: UserError when a file is missing or damaged, StorageError when one cannot be
          read at the moment.
        """
        values = {
            name: np.empty(self.shapes[name], self.dtypes[name])
            for name in self.names
            if name.startswith(prefix)
        }
        seen = dict.fromkeys(values, 0)
        for leaf in self._files:
            name, index = stacked_name(leaf)
            if name not in values:
                continue
            tensor, target = self._stored[leaf], values[name][index]
            if tensor.shape != target.shape or DTYPES[tensor.dtype] != target.dtype:
                raise UserError(
                    f"{self.folder}: {leaf} has another shape or type than the other layers: copy"
                    " or export it again"
                )
            place: Any = (*index, ...)
            memory = values[name][place].reshape(-1).view(np.uint8)
            with self._reading():
                manifest.retry_read(
                    lambda tensor=tensor, memory=memory: paths.read_into(  # type: ignore[misc]
                        tensor.file, tensor.start, memory
                    )
                )
            seen[name] += 1
        for name, count in seen.items():
            if count < math.prod(self.shapes[name][: stack_axes(name)]):
                raise UserError(f"{self.folder} lacks layers of {name}: copy or export it again")
        return values

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what reading a file raises into what the caller should know."""
        try:
            yield
        except manifest.DamageError as error:
            raise UserError(f"{error}: copy or export {self.folder} again") from error
        except (EOFError, FileNotFoundError) as error:
            raise UserError(
                f"{self.folder} cannot be read ({error}): copy or export it again"
            ) from error
        except OSError as error:
            raise manifest.unreadable(self.folder, error) from error

    def verify(self, process_group: ProcessGroup | None = None) -> None:
        """Compares every byte with the manifest. All processes of a run must call it together
        and share the reading.

        process_group: the processes of the run; by default a `SingleProcess`.

        Raises: UserError naming the first file that differs from what was exported,
          StorageError for one that cannot be read at the moment.
        """
        with self._reading():
            verify(self.folder, self._manifest, process_group)


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
        parts = {name: PartReference(**part) for name, part in content.get("parts", {}).items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder} is no export of this project: its {CONFIG} is missing or foreign; name a"
            " folder that launch.export wrote"
        ) from error
    if version not in (1, VERSION) or kind not in KINDS:
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
    tokenizer, lora = find_tokenizer(folder), content.get("lora", {})
    return Export(
        folder, kind, config, tokenizer, listing.digest, names, parts, lora, files, listing
    )
