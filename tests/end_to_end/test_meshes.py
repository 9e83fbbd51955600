"""Eight devices in any shape of mesh give the losses of one; a row that is packed gives each
token the loss it has alone.
"""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import AttentionConfig, FeedForwardConfig, MeshConfig
from flamingo_jax.json_lines import read_lines
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training import loop
from tests.training import world

STEPS = 100
SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
# Eight heads, so that `model` can take all eight devices.
MODEL = dataclasses.replace(
    world.FLAMINGO,
    language_model=dataclasses.replace(
        world.FLAMINGO.language_model,
        width=32,
        attention=AttentionConfig(heads=8, head_width=4),
        feed_forward=FeedForwardConfig(width=64),
    ),
    conditioning=dataclasses.replace(
        world.FLAMINGO.conditioning, heads=8, head_width=4, feed_forward=64
    ),
)


def run(workdir: pathlib.Path, mesh: MeshConfig, **form: object) -> np.ndarray:
    """The losses of `STEPS` steps."""
    training = dataclasses.replace(
        world.experiment().training, steps=STEPS, save_every=STEPS, **form
    )  # type: ignore[arg-type]
    # At higher rates a hundred steps of Adam on random tokens blow rounding up past the bound.
    optimizer = dataclasses.replace(world.experiment().optimizer, learning_rate=1e-4)
    experiment = world.experiment(flamingo=MODEL, mesh=mesh, training=training, optimizer=optimizer)
    loop.train(experiment, world.streams(), {}, workdir)
    return np.array([line["loss"] for line in read_lines(workdir / "metrics.jsonl")])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The losses on a single device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        losses = run(tmp_path_factory.mktemp("alone"), MeshConfig())
    assert len(losses) == STEPS and losses[-1] < losses[0]
    return losses


@pytest.mark.scale
@pytest.mark.parametrize("shape", SHAPES)
def test_every_mesh_gives_the_losses_of_one_device(
    alone: np.ndarray, shape: tuple[int, int, int], tmp_path: pathlib.Path
) -> None:
    np.testing.assert_allclose(run(tmp_path, MeshConfig(*shape)), alone, rtol=1e-5)


@pytest.mark.scale
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stream_with_less_kept_gives_them_on_every_mesh(
    alone: np.ndarray, shape: tuple[int, int, int], tmp_path: pathlib.Path
) -> None:
    """Where `model` is more than 1, the residual stream lies over it along the sequence."""
    losses = run(tmp_path, MeshConfig(*shape), remat="products", frames_at_once=3)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_packing_changes_no_tokens_loss() -> None:
    """Segments of a packed row against the same tokens in rows of their own."""
    model = Flamingo(world.FLAMINGO, rngs=nnx.Rngs(0))
    gates = model.gated_xattn.layers
    gates.attention_gate[...] = gates.dense_gate[...] = jnp.full(gates.attention_gate.shape, 0.7)
    batch = world.batch(world.DATA["m3w"], 3)

    visual_tokens = jax.jit(model.encode_visuals)(
        jnp.asarray(batch["images"]), jnp.asarray(batch["frame_mask"])
    )
    graph, state = nnx.split(model)
    forward = jax.jit(
        lambda state, **arrays: nnx.merge(graph, state)(visual_tokens=visual_tokens, **arrays)
    )

    def losses(rows: dict[str, np.ndarray]) -> np.ndarray:
        """[B, L]: of the token at each place, from what stands before it in its segment; 0
        where none does.
        """
        names = ("tokens", "positions", "segments", "media_index", "visuals")
        logits = forward(state, **{name: rows[name] for name in names})
        steps = -jax.nn.log_softmax(logits[:, :-1])
        found = np.take_along_axis(np.asarray(steps), rows["tokens"][:, 1:, None], -1)[..., 0]
        follows = (rows["segments"][:, 1:] == rows["segments"][:, :-1]) & (
            rows["segments"][:, 1:] > 0
        )
        return np.pad(np.where(follows, found, 0), ((0, 0), (1, 0)))

    packed = losses(batch)
    apart = np.zeros_like(packed)
    for segment in (1, 2):
        mine = batch["segments"] == segment
        # Shifted to the front of a row of its own.
        order = np.argsort(~mine, axis=1, kind="stable")
        rows = {
            name: np.take_along_axis(batch[name], order, 1)
            for name in ("tokens", "positions", "segments", "media_index")
        }
        kept = np.take_along_axis(mine, order, 1)
        rows["segments"] = np.where(kept, 1, 0).astype(np.int32)
        alone = losses(rows | {"visuals": batch["visuals"]})
        apart[mine] = alone[kept]
    assert (packed > 0).sum() > 50
    np.testing.assert_allclose(packed, apart, atol=1e-5)
