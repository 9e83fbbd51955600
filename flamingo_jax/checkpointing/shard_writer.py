"""Writes the safetensors files of an export, tensor by tensor, and continues a write that was
killed.

A plan of the files is written first. Each finished file is recorded with its digest, which is
computed as the file is written, so that no file is read again for the manifest.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.manifest import FileDigest
from flamingo_jax.checkpointing.stored_tensors import DTYPES
from flamingo_jax.checkpointing.streaming import (
    HashingReader,
    StreamedTensor,
    TensorStream,
    read_ahead,
)
from flamingo_jax.errors import StorageError, UserError
from flamingo_jax.progress import Bar

log = logging.getLogger(__name__)

PLAN = ".export-begun"
"""The first file of an export, with its plan: marks a folder without a manifest as an
unfinished export, which may be continued or removed."""
RECORD = ".export-file-"
"""Prefix of the name of a finished file's record: its size and digest as JSON."""
SHORT = 2**28
"""Below this number of bytes no progress bar is shown, since writing is over at once."""
_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class ExportFile(NamedTuple):
    """A safetensors file to write, and the tensors in it, in their order in the file."""

    file: str
    tensors: tuple[StreamedTensor, ...]

    @property
    def bytes(self) -> int:
        """The size of its tensors."""
        return sum(tensor.bytes for tensor in self.tensors)


def plan_shards(tensors: Sequence[StreamedTensor], shard_bytes: int) -> list[ExportFile]:
    """Groups tensors, in their order, into files of at most `shard_bytes`; a larger tensor
    gets a file of its own.
    """
    groups: list[list[StreamedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    # Tensors of wider types first, so that each is aligned in the file.
    return [
        ExportFile(
            f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize)),
        )
        for number, group in enumerate(groups, 1)
    ]


def write_shards(
    folder: pathlib.Path, shards: Sequence[ExportFile], stream: TensorStream, document: Any
) -> dict[str, FileDigest]:
    """Writes the files of a plan into `folder`, an export that is not complete yet, and checks
    what was read for them.

    An unfinished export of the same stream, plan and document in the folder is continued: its
    finished files are hashed, and those that are whole are kept. Any other is removed.

    Args:
      document: the export's config.json, as a part of what the plan is for.

    Returns: {file: digest}. The files are on the disk, or in the bucket.
    Raises: OSError where writing fails; what `stream.check` and the tensors raise.
    """
    done = _begin(folder, shards, stream, document)
    left = [shard for shard in shards if shard.file not in done]
    total = sum(shard.bytes for shard in shards)
    kept = total - sum(shard.bytes for shard in left)
    reader = HashingReader()
    pieces = read_ahead((tensor for shard in left for tensor in shard.tensors), reader)
    with (
        # A file is flushed or uploaded while the next one is written.
        concurrent.futures.ThreadPoolExecutor(1) as finisher,
        tempfile.TemporaryDirectory() as local,
        contextlib.closing(pieces),
        Bar(
            f"writing {folder.name.removesuffix(manifest.unfinished(''))}",
            total >> 20,
            start=kept >> 20,
            enabled=total >= SHORT,
        ) as bar,
    ):
        finishing: list[concurrent.futures.Future[None]] = []
        for shard in left:
            path = (pathlib.Path(local) if paths.is_bucket(folder) else folder) / shard.file
            done[shard.file] = _write(path, shard, pieces, bar)
            # Not more than one, so that the disk of this machine holds two files of a bucket's.
            while finishing:
                finishing.pop().result()
            finishing.append(finisher.submit(_finish, folder, path, done[shard.file]))
        for future in finishing:
            future.result()
    try:
        stream.check(reader)
    except StorageError:
        raise
    except UserError:
        # What was written of a damaged source is not kept.
        remove_plan(folder)
        raise
    return done


def plan_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files of the plan, which do not belong to the export: records first."""
    return [*folder.glob(f"{RECORD}*"), folder / PLAN]


def remove_plan(folder: pathlib.Path) -> None:
    """Removes the plan and the records of a complete export."""
    for file in plan_files(folder):
        file.unlink(missing_ok=True)


def _begin(
    folder: pathlib.Path, shards: Sequence[ExportFile], stream: TensorStream, document: Any
) -> dict[str, FileDigest]:
    """Prepares the folder of an unfinished export; returns its whole files with their digests."""
    plan = {
        "identity": stream.identity,
        "document": document,
        "files": {
            shard.file: [[t.name, t.dtype.name, *t.shape] for t in shard.tensors]
            for shard in shards
        },
    }
    # What JSON makes of it, to compare it with what was read.
    text = json.dumps(plan)
    before = _read_json(folder / PLAN)
    if stream.identity and before == json.loads(text):
        done = _whole_files(folder, shards)
        log.info("continuing %s: %d of %d files are whole", folder, len(done), len(shards))
        return done
    if before is not None:
        log.warning("%s is begun anew: what was there is of other parameters", folder)
    if paths.is_bucket(folder):
        if manifest.is_there(folder / PLAN):
            paths.remove_folder(folder)
    elif folder.exists():
        paths.remove_folder(folder)
    paths.make_folder(folder)
    manifest.write_atomically(folder / PLAN, text.encode())
    return {}


def _whole_files(folder: pathlib.Path, shards: Sequence[ExportFile]) -> dict[str, FileDigest]:
    """Finds the files that an earlier start has finished and that are as they were recorded."""
    found: dict[str, FileDigest] = {}
    for shard in shards:
        record = _read_json(folder / f"{RECORD}{shard.file}.json")
        try:
            recorded = FileDigest(**record)
            if manifest.file_digest(folder / shard.file) == recorded:
                found[shard.file] = recorded
        except (FileNotFoundError, TypeError):
            continue
    return found


def _read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file; None where there is none, or no JSON in it."""
    try:
        return json.loads(manifest.retry_read(path.read_bytes))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _write(
    path: pathlib.Path,
    shard: ExportFile,
    pieces: Iterator[tuple[StreamedTensor, np.ndarray]],
    bar: Bar,
) -> FileDigest:
    """Writes a safetensors file of the next pieces: 8 bytes with the size of the header, the
    header, the tensors. The safetensors library writes only what is completely in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    start = 0
    for tensor in shard.tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, start + tensor.bytes],
        }
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Blanks at its end align the tensors.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    with (
        concurrent.futures.ThreadPoolExecutor(1) as hasher,
        open(path, "wb", buffering=0) as file,
    ):

        def put(data: memoryview | bytes) -> None:
            # Both release the interpreter's lock.
            hashing = hasher.submit(digest.update, data)
            done = 0
            while done < len(data):
                done += file.write(data[done:])
            hashing.result()

        put(len(text).to_bytes(8, "little") + text)
        while size < shard.bytes:
            _, piece = next(pieces)
            put(piece.reshape(-1).view(np.uint8).data)
            before, size = size, size + piece.nbytes
            bar.advance((size >> 20) - (before >> 20), "MiB")
            # Not held while the next one is waited for.
            del piece
    return FileDigest(8 + len(text) + size, digest.hexdigest())


def _finish(folder: pathlib.Path, path: pathlib.Path, digest: FileDigest) -> None:
    """Flushes a file to the disk, or uploads it, and records it."""
    if paths.is_bucket(folder):
        paths.upload(path, folder / path.name)
        path.unlink()
    else:
        manifest.sync_file(path)
    record = json.dumps(digest._asdict()).encode()
    manifest.write_atomically(folder / f"{RECORD}{path.name}.json", record)
