"""Held-out losses: in microbatches as in one, with images and without, read anew at every
evaluation.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import Experiment, VisionConfig, ViTConfig
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.tasks import stages
from flamingo_jax.training.held_out import HeldOutLosses
from flamingo_jax.training.prefetcher import HostBatch
from flamingo_jax.training.setup import TrainSetup, make_setup
from flamingo_jax.training.state import Parameters, TrainState, initial_state, split_model
from tests.training import world

VISION = VisionConfig(
    image_size=32, vit=ViTConfig(patch_size=16, layers=1, width=16, heads=2, feed_forward=16)
)
CONFIG = dataclasses.replace(
    world.FLAMINGO,
    vision=VISION,
    conditioning=dataclasses.replace(world.FLAMINGO.conditioning, gate_init=0.5),
)
DATASET = dataclasses.replace(world.DATA["vtp"], weight=0.3)
# The last rows of a held-out set are padding: whole microbatches may hold nothing.
LAST = {
    name: np.where(
        np.arange(len(a)).reshape(-1, *[1] * (a.ndim - 1)) < 3,
        a,
        -1 if name in ("media_index", "visuals") else 0,
    )
    for name, a in world.batch(DATASET, 4).items()
}


class Read:
    """Batches that are made at every pass; how many were."""

    def __init__(self) -> None:
        self.made = 0

    def __iter__(self) -> Iterator[HostBatch]:
        for batch in (
            world.batch(DATASET, 3),
            {name: a.astype(world.batch(DATASET, 4)[name].dtype) for name, a in LAST.items()},
        ):
            self.made += 1
            yield batch


def experiment(microbatches: int) -> Experiment:
    held_out = {"vtp": dataclasses.replace(DATASET, microbatches=microbatches)}
    return world.experiment(flamingo=CONFIG, data={"vtp": DATASET}, held_out=held_out)


@pytest.fixture(scope="module")
def made() -> tuple[TrainSetup, TrainState, Parameters]:
    setup = make_setup(experiment(1), make_mesh(experiment(1).mesh))
    _, parameters = split_model(Flamingo(CONFIG, rngs=nnx.Rngs(0)))
    parameters = jax.device_put(
        parameters,
        {name: s.sharding for name, s in (setup.trainable | setup.frozen).items()},
    )
    trainable = {name: parameters[name] for name in setup.trainable}
    return (
        setup,
        initial_state(trainable, setup.optimizer, 0),
        {name: parameters[name] for name in setup.frozen},
    )


def evaluated(
    made: tuple[TrainSetup, TrainState, Parameters], microbatches: int, compiled: bool = False
) -> tuple[dict[str, float], Read]:
    setup, state, frozen = made
    config, batches = experiment(microbatches), Read()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        evaluate = HeldOutLosses(setup, stages.make_task(config), {"vtp": batches}, config, mesh)
        if compiled:
            programs = evaluate.compile(state.trainable, frozen)
            assert list(programs) == ["vtp"] and batches.made == 1
            memory = programs["vtp"].memory_analysis()
            assert memory is None or memory.argument_size_in_bytes > 0
        return evaluate(state.trainable, frozen), batches


def test_microbatches_give_the_same_losses(
    made: tuple[TrainSetup, TrainState, Parameters],
) -> None:
    """As one batch does, compiled before or when it is asked for; each batch is read when its
    turn comes.
    """
    whole, batches = evaluated(made, 1)
    assert batches.made == 2
    parts, batches = evaluated(made, 4, compiled=True)
    assert batches.made == 3
    assert set(parts) == set(whole) and "vtp/loss_without_images" in whole
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-5), name
    assert whole["vtp/loss"] != pytest.approx(whole["vtp/loss_without_images"], rel=1e-4)
    assert whole["loss"] == pytest.approx(0.3 * whole["vtp/loss"])


def test_losses_are_those_of_the_rows_written_out(
    made: tuple[TrainSetup, TrainState, Parameters],
) -> None:
    """The mean over sequences of the sum over their tokens, over all batches together."""
    model = Flamingo(CONFIG, rngs=nnx.Rngs(0))
    total, sequences = 0.0, 0
    for batch in Read():
        visual_tokens = model.encode_visuals(
            jnp.asarray(batch["images"]), jnp.asarray(batch["frame_mask"])
        )
        logits = model(
            *(
                jnp.asarray(batch[name])
                for name in ("tokens", "positions", "segments", "media_index")
            ),
            visual_tokens,
            batch["visuals"],
        )
        log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
        for row, place in np.argwhere(batch["loss_mask"][:, 1:]):
            if batch["segments"][row, place] == batch["segments"][row, place + 1] > 0:
                total -= log_p[row, place, batch["tokens"][row, place + 1]]
        sequences += int(batch["segments"].max(axis=1).sum())
    values, _ = evaluated(made, 4)
    assert values["vtp/loss"] == pytest.approx(total / sequences, rel=1e-5)
