"""Times a training step, part by part, on the devices of this machine."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flamingo_jax.experiment import Experiment
from flamingo_jax.models.packing import Packing
from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.partitioning.mesh import check_batches, make_mesh
from flamingo_jax.planning.synthetic import full_batches
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.flops import Work, step_cost, work_in
from flamingo_jax.training.prefetcher import shard_batch
from flamingo_jax.training.pretrained import load_frozen
from flamingo_jax.training.setup import initialise, make_setup
from flamingo_jax.training.state import merge_model
from flamingo_jax.training.step import compile_update, laid_out, make_update


class Timing(NamedTuple):
    """Holds the timing of a step; seconds are medians.

    parts: {part of the step: seconds}, each compiled and timed alone; the remainder is
      attributed to the gated blocks and the rest. flops: of the step by the formula
      (`tasks.flops`).
    matrix_rate: FLOPs per second of a large matrix product on the same devices in the same
      run.
    """

    step: float
    parts: dict[str, float]
    tokens: int
    frames: int
    flops: int
    matrix_rate: float
    compile_seconds: float

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, relative to the measured `matrix_rate`."""
        return self.flops / self.step / self.matrix_rate


class RunningStep:
    """An experiment's compiled update with its state, on full rows of random content.

    To be made and called within `jax.set_mesh(mesh)`. `made` are the batches on the host.

    Raises: UserError if batches do not divide over the mesh.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        check_batches(experiment, mesh)
        self.experiment = experiment
        self.setup = make_setup(experiment, mesh)
        frozen, _ = load_frozen(experiment, self.setup.frozen)
        self.state = initialise(experiment, self.setup)
        update = make_update(
            self.setup.graph,
            stages.make_task(experiment),
            self.setup.optimizer,
            experiment.data,
            experiment.training.round_robin,
            self.setup.gradient_shardings,
            self.setup.schedule,
        )
        self.made = full_batches(experiment, HostShard.of(mesh))
        self.batches = {name: shard_batch(batch, mesh) for name, batch in self.made.items()}
        began = time.monotonic()
        self.compiled = compile_update(update, self.state, frozen, self.batches)
        self.compile_seconds = time.monotonic() - began
        # Bring frozen weights into the layout that the compiled step wants, once.
        self.frozen = laid_out(self.compiled, frozen)

    def __call__(self, batches: Any = None) -> Any:
        """Runs a step, by default on the batches that were made, and returns its metrics."""
        given = self.batches if batches is None else batches
        self.state, metrics = self.compiled(self.state, self.frozen, given)
        return metrics

    def work(self) -> Work:
        """Counts the work of a step."""
        return Work(*map(int, work_in(self.made.values())))

    def flops(self) -> int:
        """Counts the FLOPs of a step by the formula."""
        return step_cost(self.experiment).of(self.work())

    def time_parts(self, steps: int) -> dict[str, float]:
        """Times the parts of the step, each compiled and timed alone: {part: seconds}."""
        return _parts(self.experiment, self.setup, self.state, self.frozen, self.batches, steps)


def time_step(experiment: Experiment, *, steps: int = 10, trace: str = "") -> Timing:
    """Times the experiment's real update on full rows of random content.

    steps: number of timed steps after one that warms up. trace: folder for a profiler trace of
    three more steps, "" for none.

    Raises: UserError if batches do not divide over the mesh.
    """
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        step = RunningStep(experiment, mesh)
        parts = step.time_parts(steps)
        seconds = median_seconds(step, steps)
        if trace:
            with jax.profiler.trace(trace):
                jax.block_until_ready([step() for _ in range(3)])
        work = step.work()
        parts["gated blocks and the rest"] = max(seconds - sum(parts.values()), 0.0)
    rate = matrix_rate(jnp.dtype(experiment.training.compute_dtype), steps) * mesh.size
    return Timing(
        seconds, parts, work.tokens, work.frames, step.flops(), rate, step.compile_seconds
    )


def _parts(
    experiment: Experiment, setup: Any, state: Any, frozen: Any, batches: Any, steps: int
) -> dict[str, float]:
    """Times the parts of a Flamingo's step; for other tasks only the optimizer."""
    found = {}
    if experiment.task == "flamingo":
        seen = [batch for batch in batches.values() if "images" in batch]
        images, masks = [batch["images"] for batch in seen], [batch["frame_mask"] for batch in seen]

        def model(trainable: Any) -> Any:
            return merge_model(setup.graph, trainable, frozen)

        encode = jax.jit(lambda trainable: model(trainable).encode_images(images))
        features = encode(state.trainable)
        found["vision encoder"] = median_seconds(lambda: encode(state.trainable), steps)
        # The resampler is trained, so its backward pass is timed too; a sum serves as the
        # loss.
        resample = jax.jit(
            jax.grad(
                lambda trainable: (
                    model(trainable).resample(features, masks).astype(jnp.float32).sum()
                )
            )
        )
        found["resampler"] = median_seconds(lambda: resample(state.trainable), steps)

        # The gradient with respect to a shift of the embeddings runs the backward pass through
        # the frozen language model without gradients of its weights, as in training.
        def text_loss(shift: jax.Array) -> jax.Array:
            lm = model(state.trainable).language_model
            total = jnp.float32(0)
            for batch in batches.values():
                x = lm.embed(batch["tokens"]) + shift
                x = lm.run_layers(x, batch["positions"], Packing((batch["segments"],)))
                total += jax.nn.logsumexp(lm.logits(x), axis=-1).sum()
            return total

        read = jax.jit(jax.grad(text_loss))
        shift = jnp.zeros(
            (stages.model_config(experiment).language_model.width,),
            jnp.dtype(experiment.training.compute_dtype),
        )
        found["language model"] = median_seconds(lambda: read(shift), steps)
    optimise = jax.jit(
        lambda state: optax.apply_updates(
            state.trainable,
            setup.optimizer.update(state.trainable, state.optimizer, state.trainable)[0],
        )
    )
    found["optimizer"] = median_seconds(lambda: optimise(state), steps)
    return found


def median_seconds(run: Callable[[], Any], steps: int) -> float:
    """Returns the median time of `steps` runs after one that warms up; waits for each
    result.
    """
    jax.block_until_ready(run())
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def matrix_rate(dtype: DTypeLike, steps: int) -> float:
    """Measures FLOPs per second and device of a large square matrix product, on all devices of
    this process at once, since CPU devices share the cores.
    """
    # Large enough to reach the peak rate.
    size = 2048 if jax.devices()[0].platform == "cpu" else 8192
    factors = [
        jax.device_put(jnp.ones((size, size), dtype), device) for device in jax.local_devices()
    ]
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / median_seconds(lambda: [product(a) for a in factors], steps)
