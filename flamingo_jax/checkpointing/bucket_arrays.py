"""Writes and reads the arrays of a checkpoint in a bucket.

    <folder>/<name>/zarr.json    shape, dtype and chunks of the array, in Zarr's format (v3)
    <folder>/<name>/c/0/2/...    a chunk: the shard of one device, or an equal part of it

orbax does not support S3, and it renames folders, which buckets cannot do. So tensorstore, on
which orbax is built, is used directly: each process writes the chunks of its own devices, and
each chunk is an object that appears atomically. Chunks are not compressed, since moments
hardly shrink. Whether all chunks have been written is recorded by the checkpoint's manifest.
"""

import concurrent.futures
import math
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from flamingo_jax.checkpointing.stored_arrays import StoredArrays

CHUNK_BYTES = 256 << 20
"""The largest size of an object: larger ones would need several requests."""
RETRIES = {"max_retries": 10, "initial_delay": "200ms", "max_delay": "10s"}
"""Retries of a request that failed: about a minute in all."""
SETTINGS = {"s3_request_retries": RETRIES, "gcs_request_retries": RETRIES}
"""Of tensorstore's context."""
THREADS = 8
_Index = tuple[slice, ...]


class BucketArrays:
    """Saves and restores arrays by name, as `DiskArrays` does on a disk."""

    def __init__(self) -> None:
        self._context = ts.Context(SETTINGS)
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, folder: pathlib.Path, arrays: Mapping[str, jax.Array]) -> None:
        """Begins to save arrays; returns as soon as they may be overwritten or donated."""
        self.wait_until_finished()
        own = {
            name: [shard for shard in array.addressable_shards if shard.replica_id == 0]
            for name, array in arrays.items()
        }
        for shards in own.values():
            for shard in shards:
                shard.data.copy_to_host_async()
        # The arrays may be donated as soon as this returns, and on CPU np.array without a copy
        # would share their memory.
        blocks = {
            name: [(shard.index, np.array(shard.data, copy=True)) for shard in shards]
            for name, shards in own.items()
        }
        specs = {name: self._spec(folder, name, array) for name, array in arrays.items()}
        self._writing = threading.Thread(
            target=self._write, args=(specs, blocks), name="bucket-arrays"
        )
        self._writing.start()

    def wait_until_finished(self) -> None:
        """Waits until this process has written its chunks. Raises OSError, once, if that
        failed.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise OSError(f"the bucket did not take it: {_first_line(failure)}") from failure

    def restore(
        self, folder: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Reads the arrays named in `targets` with the given dtypes and shardings; each
        process reads the shards of its own devices.

        Raises: OSError when the bucket cannot be read.
        """

        def one(name: str) -> jax.Array:
            target = targets[name]
            stored = ts.open(
                {"driver": "zarr3", "kvstore": _kvstore(folder / name)},
                open=True,
                context=self._context,
            ).result()
            known: dict[str, np.ndarray] = {}

            def read(index: _Index | None) -> np.ndarray:
                # Devices that hold the same shard share one read.
                if str(index) not in known:
                    found = stored[index].read().result() if index else stored.read().result()
                    known[str(index)] = np.asarray(found, target.dtype)
                return known[str(index)]

            return jax.make_array_from_callback(target.shape, target.sharding, read)

        try:
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                return dict(zip(targets, pool.map(one, targets), strict=True))
        except ValueError as error:
            raise OSError(f"the bucket does not give it: {_first_line(error)}") from error

    def open(self, folder: pathlib.Path) -> StoredArrays:
        """Opens arrays for reading a piece at a time."""
        return StoredArrays({"driver": "zarr3"}, _kvstore(folder), SETTINGS)

    def close(self) -> None:
        """Waits for the save in flight."""
        self.wait_until_finished()

    def _spec(self, folder: pathlib.Path, name: str, array: jax.Array) -> dict[str, Any]:
        chunk = chunk_shape(array.sharding.shard_shape(array.shape), array.dtype.itemsize)
        return {
            "driver": "zarr3",
            "kvstore": _kvstore(folder / name),
            "metadata": {
                "shape": array.shape,
                "data_type": array.dtype.name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                # Chunks that equal the fill value are written too, because of the option
                # below.
                "fill_value": 0,
            },
            "store_data_equal_to_fill_value": True,
        }

    def _write(
        self,
        specs: Mapping[str, dict[str, Any]],
        blocks: Mapping[str, list[tuple[_Index, np.ndarray]]],
    ) -> None:
        # Process 0 writes the metadata of the arrays; the others assume the same metadata.
        primary = jax.process_index() == 0
        how: dict[str, Any] = {"create": True} if primary else {"assume_metadata": True}
        try:
            opened = {
                name: ts.open(spec, open=True, context=self._context, **how)
                for name, spec in specs.items()
                if blocks[name] or primary
            }
            pending = [
                opened[name]
                .result()[index]
                .write(block, can_reference_source_data_indefinitely=True)
                for name, found in blocks.items()
                for index, block in found
            ]
            for write in pending:
                write.result()
        except BaseException as error:  # noqa: BLE001 - it is raised by who waits
            self._failure = error


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Returns a chunk shape of at most (nearly) `CHUNK_BYTES` that divides `shape`. Leading
    axes are split first, so that a chunk is contiguous in memory.
    """
    chunk = [max(size, 1) for size in shape]
    for axis, size in enumerate(chunk):
        parts = math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES)
        if parts <= 1:
            break
        chunk[axis] = max((n for n in range(1, size // parts + 1) if size % n == 0), default=1)
    return chunk


def _kvstore(path: pathlib.Path) -> dict[str, Any]:
    """Returns the tensorstore spec of a path in a bucket."""
    scheme, _, rest = str(path).partition("://")
    bucket, _, key = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{key}/"}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        found["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # Without an endpoint or region, tensorstore asks AWS for them.
    if endpoint:
        found |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        found["aws_region"] = region
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
