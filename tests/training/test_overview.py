"""The overview of parameters, against the arrays themselves."""

import io

import jax
import jax.numpy as jnp
from rich.console import Console

from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training import overview
from flamingo_jax.training.setup import make_setup
from tests.training import world


def test_parts_are_counted_as_their_arrays_lie() -> None:
    experiment = world.experiment(mesh=MeshConfig(data=2, fsdp=2, model=2))
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        summaries = {summary.part: summary for summary in overview.summarise(setup)}
        assert {name for name, s in summaries.items() if not s.trained} == {
            "vision_encoder",
            "language_model",
        }
        for trained, parameters in ((True, setup.trainable), (False, setup.frozen)):
            chosen = [summary for summary in summaries.values() if summary.trained is trained]
            assert sum(summary.arrays for summary in chosen) == len(parameters)
        part = summaries["gated_xattn"]
        arrays = [
            jnp.zeros(like.shape, like.dtype, device=like.sharding)
            for name, like in setup.trainable.items()
            if name.startswith("gated_xattn/")
        ]
    assert part.parameters == sum(array.size for array in arrays)
    assert part.bytes_per_device == sum(a.addressable_shards[0].data.nbytes for a in arrays)
    assert part.bytes_per_device < 4 * part.parameters and part.dtype == "float32"
    assert part.shape == setup.trainable[part.largest].shape and "model" in part.sharding
    shown = io.StringIO()
    Console(file=shown, width=200).print(overview.table(list(summaries.values())))
    assert f"{part.parameters:,}" in shown.getvalue() and part.sharding in shown.getvalue()
