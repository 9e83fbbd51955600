"""Arrays of a checkpoint straight into a bucket and out of it.

    <folder>/<name>/zarr.json    shape, dtype and chunks of the array, in Zarr's format (v3)
    <folder>/<name>/c/0/2/...    a chunk: what one device holds, or an equal part of it

orbax knows no S3 and renames folders, which no bucket can. With tensorstore, which it stands on,
each process writes the chunks of its own devices, each an object that appears whole; none is
compressed, moments hardly shrink. Nothing says that all are there: the checkpoint's manifest does.
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

CHUNK_BYTES = 256 << 20
"""The most that one object holds: stores take larger ones in several requests only."""
RETRIES = {"max_retries": 10, "initial_delay": "200ms", "max_delay": "10s"}
"""Of a request that the store could not answer: about a minute in all."""
THREADS = 8
_Index = tuple[slice, ...]


class BucketArrays:
    """Saves and restores arrays by name, as orbax's StandardCheckpointer does on a disk."""

    def __init__(self) -> None:
        self._context = ts.Context({"s3_request_retries": RETRIES, "gcs_request_retries": RETRIES})
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
        # On CPU an array's memory would be looked at, not copied.
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
        """Returns when what this process saves is in the bucket. Raises what went wrong, once."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise OSError(f"the bucket did not take it: {_first_line(failure)}") from failure

    def restore(
        self, folder: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Reads arrays of these names with the dtypes and shardings of `targets`; each process
        reads what its own devices hold.

        Raises: OSError where the bucket does not give them.
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
                # Devices that hold the same share one read.
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

    def close(self) -> None:
        """Waits for what is being saved."""
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
                # What equals the fill value is not written unless that is asked for.
                "fill_value": 0,
            },
            "store_data_equal_to_fill_value": True,
        }

    def _write(
        self,
        specs: Mapping[str, dict[str, Any]],
        blocks: Mapping[str, list[tuple[_Index, np.ndarray]]],
    ) -> None:
        # The first process describes the arrays; the others know the description.
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
    """Returns a shape of at most `CHUNK_BYTES`, or nearly, that divides `shape`: leading axes are
    split first, so that a chunk is a run of memory.
    """
    chunk = [max(size, 1) for size in shape]
    for axis, size in enumerate(chunk):
        parts = math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES)
        if parts <= 1:
            break
        chunk[axis] = max((n for n in range(1, size // parts + 1) if size % n == 0), default=1)
    return chunk


def _kvstore(path: pathlib.Path) -> dict[str, Any]:
    """Returns tensorstore's words for a place in a bucket."""
    scheme, _, rest = str(path).partition("://")
    bucket, _, key = rest.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{key}/"}
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{key}/"}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        found["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # What is not given tensorstore asks AWS for.
    if endpoint:
        found |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
        found["aws_region"] = region
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
