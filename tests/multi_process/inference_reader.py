"""One process of several that use an exported Flamingo together: tells what every method makes
of the prompts, or only what loading it took.

    python -m tests.multi_process.inference_reader INDEX COUNT PORT EXPORT MESH [load]
"""

import json
import resource
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.pytrees import to_flat
from tests.inference.meshes import results


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes(flamingo: fj.Flamingo) -> int:
    """The bytes of all different shards that this process's devices hold."""
    return sum(
        len({str(shard.index) for shard in value.addressable_shards})
        * value.addressable_shards[0].data.nbytes
        for value in to_flat(nnx.split(flamingo)[1]).values()
    )


def main() -> None:
    index, count, port, export, sizes, *only = sys.argv[1:]
    if int(count) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    mesh = fj.make_mesh(sizes) if sizes else None
    before = peak_bytes()
    model = fj.load(export, mesh=mesh)
    told: dict[str, Any] = {"held": held_bytes(model.flamingo), "taken": peak_bytes() - before}
    if not only:
        told["results"] = results(model)
    print(json.dumps(told, default=lambda array: np.asarray(array).tolist()))


if __name__ == "__main__":
    main()
