"""One process of several that load frozen parts: tells how many bytes it read, and of what
fails.

    python -m tests.multi_process.frozen_reader INDEX COUNT PORT EXPORT ENCODER OTHER MESH

OTHER: a folder that is verified after the export, of which every process may have a copy of its
  own.
"""

import json
import pathlib
import sys

import jax
import numpy as np

from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.checkpointing.verification import file_digests
from flamingo_jax.configuring import from_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LanguageModelConfig, MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training.pretrained import load_frozen
from flamingo_jax.training.setup import make_setup
from tests.training import world


def bytes_read() -> int:
    """What this process has read from files so far, by the kernel's count."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def main() -> None:
    index, count, port, export, encoder, other, sizes = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    config = from_json(LanguageModelConfig, open_export(export).config)
    flamingo = world.experiment().flamingo
    experiment = world.experiment(
        flamingo=type(flamingo)(**(vars(flamingo) | {"language_model": config})),
        language_model_from=export,
        vision_encoder_from=encoder,
        training=type(world.experiment().training)(compute_dtype="bfloat16"),
    )
    mesh = make_mesh(MeshConfig(*map(int, sizes.split("x"))))
    told = {}
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        for time in ("first", "again"):
            before = bytes_read()
            frozen, digests = load_frozen(experiment, setup.frozen)
            told[time] = bytes_read() - before
    told["digest"] = digests["language_model"]["digest"]
    whole = open_export(export).read()
    for name, value in frozen.items():
        target = setup.frozen[name]
        assert value.sharding == target.sharding and value.dtype == target.dtype
        expected = whole.get(name.removeprefix("language_model/"))
        for shard in value.addressable_shards if expected is not None else ():
            np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=name)
    folder = pathlib.Path(other.format(index=index))
    try:
        file_digests(folder, sorted(file.name for file in folder.iterdir()))
    except UserError as error:
        told["error"] = str(error)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
