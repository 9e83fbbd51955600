"""One process of several that use an exported Flamingo together: tells what every method makes
of the prompts.

    python -m tests.multi_process.inference_reader INDEX COUNT PORT EXPORT MESH
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.pytrees import to_flat
from tests.inference.meshes import results


def main() -> None:
    index, count, port, export, mesh = sys.argv[1:]
    if int(count) > 1:
        jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    model = fj.load(export, mesh=fj.make_mesh(mesh) if mesh else None)
    found = results(model)
    held = sum(
        len({str(shard.index) for shard in value.addressable_shards})
        * value.addressable_shards[0].data.nbytes
        for value in to_flat(nnx.split(model.flamingo)[1]).values()
    )
    print(
        json.dumps(
            {"results": found, "held": held}, default=lambda array: np.asarray(array).tolist()
        )
    )


if __name__ == "__main__":
    main()
