"""A step compiled on shapes alone: its memory and FLOPs, on the host's devices and, where
libtpu is installed, for TPUs that are not here.
"""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import MeshConfig, VisionConfig, ViTConfig
from flamingo_jax.partitioning.mesh import check_batches, make_mesh
from flamingo_jax.planning.hlo import summarise
from flamingo_jax.planning.program import (
    DoesNotFit,
    Memory,
    _needed,
    batch_shapes,
    compile_held_out,
    compile_program,
    full_work,
    smaller,
)
from flamingo_jax.planning.topology import open_topology
from flamingo_jax.tasks.flops import work_in
from flamingo_jax.training.setup import make_setup
from tests.training import world


def test_batches_are_those_that_training_gets() -> None:
    mesh = make_mesh(MeshConfig())
    made = batch_shapes(world.experiment(flamingo=world.FLAMINGO), mesh)
    for name, batch in world.batches().items():
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            key: (s.shape, s.dtype) for key, s in made[name].items()
        }


def test_full_work_is_the_work_of_full_batches() -> None:
    full = {
        name: batch | {"segments": np.ones_like(batch["segments"])}
        for name, batch in world.batches().items()
    }
    assert full_work(world.experiment()) == work_in(full.values())


def test_memory_and_flops_of_a_compiled_step() -> None:
    experiment = world.experiment()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = compile_program(experiment, mesh)
    setup = make_setup(experiment, mesh)
    assert program.largest[0]["bytes"] >= program.largest[-1]["bytes"] > 0
    arrays = jax.tree.leaves((setup.state, setup.frozen, batch_shapes(experiment, mesh)))
    expected = sum(a.size * a.dtype.itemsize for a in arrays)
    assert expected * 0.95 <= program.memory.arguments <= expected * 1.05
    assert program.memory.peak > program.memory.arguments
    # Attention's products of activations, which the formula leaves out, weigh much at this
    # size.
    assert 1.0 < program.jaxpr_flops / program.formula_flops < 3.0


@pytest.mark.scale
def test_depth_does_not_lengthen_the_step() -> None:
    def lines(layers: int) -> int:
        language_model = dataclasses.replace(world.FLAMINGO.language_model, layers=layers)
        training = dataclasses.replace(world.experiment().training, remat="products")
        experiment = world.experiment(
            flamingo=dataclasses.replace(
                world.FLAMINGO,
                language_model=language_model,
                conditioning=dataclasses.replace(world.FLAMINGO.conditioning, xattn_every=2),
            ),
            training=training,
        )
        return summarise(
            compile_program(experiment, make_mesh(MeshConfig(), jax.devices()[:1])).hlo
        ).instructions

    # More groups than are unrolled on CPUs.
    assert lines(40) <= 1.05 * lines(20)


def test_what_needs_less_memory_is_tried_from_the_cheapest_on() -> None:
    mesh = make_mesh(MeshConfig(data=2, model=4))
    tried = list(smaller(world.experiment(), mesh))
    assert [change for change, _ in tried][:2] == [
        "--config.training.remat=products",
        "--config.training.remat=layers",
    ]
    assert "--config.data.vtp.microbatches=4" in tried[-1][0] and len(tried) == 4
    for _, experiment in tried:
        check_batches(experiment, mesh)


def test_what_the_compiler_says_of_memory() -> None:
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory: temporaries (83.93G) exceeds available HBM"
        " (30.75G), 512.0M of 1.5K"
    )
    assert DoesNotFit(_needed(message)).needed == int(83.93 * 2**30)
    assert "83.9 GiB a device" in str(DoesNotFit(_needed(message)))


@pytest.mark.parametrize("name", ["v4", "h200:8", "v4:2by2"])
def test_an_unknown_topology_is_one_sentence(name: str) -> None:
    with pytest.raises(
        UserError, match="must be CHIP:SIZES or SLICES\\*CHIP:SIZES, such as v4:2x2x4"
    ):
        open_topology(name)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="the compiler is installed"
)
def test_without_the_compiler_it_is_named() -> None:
    with pytest.raises(UserError, match="pip install"):
        open_topology("v4:2x2x1")


def test_evaluation_is_planned_in_its_microbatches() -> None:
    """Arguments are all that is held and the batch; parts take less memory than the whole;
    colours are not jittered.
    """
    mesh, dataset = (
        make_mesh(MeshConfig(), jax.devices()[:1]),
        dataclasses.replace(world.DATA["vtp"], batch_size=64, colour=0.2),
    )
    vision = VisionConfig(
        image_size=32,
        vit=ViTConfig(patch_size=16, layers=1, width=16, heads=2, feed_forward=64),
    )

    def planned(microbatches: int) -> Memory:
        held_out = {"vtp": dataclasses.replace(dataset, microbatches=microbatches)}
        experiment = world.experiment(
            flamingo=dataclasses.replace(world.FLAMINGO, vision=vision),
            data={"vtp": dataset},
            held_out=held_out,
        )
        made = compile_held_out(experiment, mesh)
        assert list(made) == ["vtp"]
        setup, batch = make_setup(experiment, mesh), world.batch(dataset, 0)
        arrays = jax.tree.leaves((setup.trainable, setup.frozen, setup.state.optimizer, batch))
        expected = sum(a.size * a.dtype.itemsize for a in arrays)
        assert expected * 0.95 <= made["vtp"].arguments <= expected * 1.05
        return made["vtp"]

    whole, parts = planned(1), planned(8)
    assert parts.temporaries < 0.7 * whole.temporaries and parts.peak > parts.arguments
