"""Compiles the training step and the evaluation ahead of time, from shapes alone, and reads
the compiler's analysis of memory and FLOPs.
"""

import dataclasses
import math
import re
import resource
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from flamingo_jax.experiment import DatasetConfig, Experiment
from flamingo_jax.partitioning.host_shard import HostShard
from flamingo_jax.partitioning.mesh import ROWS, batch_shardings, check_batches
from flamingo_jax.processing.jitter import FIELDS
from flamingo_jax.tasks import stages
from flamingo_jax.tasks.flops import Work, product_flops, step_cost
from flamingo_jax.training.setup import TrainSetup, make_setup
from flamingo_jax.training.step import (
    compile_traced,
    make_held_out_loss,
    make_update,
    trace_update,
)


class Memory(NamedTuple):
    """Holds the memory of a program, in bytes on each device.

    results: without those that reuse the memory of donated arguments. peak: the sum of all
      three.
    """

    arguments: int
    results: int
    temporaries: int

    @property
    def peak(self) -> int:
        """Returns the memory that a device needs at once."""
        return self.arguments + self.results + self.temporaries


class DoesNotFit(Exception):
    """Signals that the compiler cannot fit the step into a chip's memory. needed: bytes per
    device according to the compiler, 0 if unknown.
    """

    def __init__(self, needed: int):
        super().__init__(
            f"the step needs {needed / 2**30:.1f} GiB a device"
            if needed
            else "the step does not fit"
        )
        self.needed = needed


class Program(NamedTuple):
    """Holds an update compiled for a mesh.

    formula_flops: FLOPs of full rows with all their visuals, by `flops.step_cost`.
    jaxpr_flops: FLOPs of the traced update, recomputation included. Both are totals over all
      devices.
    seconds: time of tracing and compiling. compiler_bytes: peak memory of this process.
    largest: the arrays that take the most memory of each device between steps, as {"name",
      "sharding", "bytes"}.
    """

    memory: Memory
    formula_flops: int
    jaxpr_flops: int
    seconds: float
    compiler_bytes: int
    hlo: str
    largest: list[dict[str, Any]]


class TracedStep(NamedTuple):
    """Holds an experiment's update, traced on shapes with shardings."""

    setup: TrainSetup
    traced: jax.stages.Traced


def trace_step(experiment: Experiment, mesh: Mesh) -> TracedStep:
    """Traces the experiment's update for `mesh`, whose devices need not exist on this machine.

    Raises: UserError if batches or parameters do not divide over the mesh.
    """
    check_batches(experiment, mesh)
    # Not within jax.set_mesh: optax creates a few scalars, which devices of a topology cannot.
    setup = make_setup(experiment, mesh)
    with jax.set_mesh(mesh):
        update = make_update(
            setup.graph,
            stages.make_task(experiment),
            setup.optimizer,
            experiment.data,
            experiment.training.round_robin,
            setup.gradient_shardings,
            setup.schedule,
        )
        return TracedStep(
            setup,
            trace_update(update, setup.state, setup.frozen, batch_shapes(experiment, mesh)),
        )


def compile_program(experiment: Experiment, mesh: Mesh) -> Program:
    """Compiles the update that `trace_step` traces, without allocating arrays on the devices.

    Raises: UserError if batches or parameters do not divide over the mesh; DoesNotFit if the
      memory of a device is too small.
    """
    began = time.monotonic()
    setup, traced = trace_step(experiment, mesh)
    compiled, memory = _compile(traced, mesh)
    text = compiled.as_text()
    assert text is not None, "every XLA backend has it"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    flops = step_cost(experiment).of(full_work(experiment))
    return Program(
        memory,
        flops,
        product_flops(traced.jaxpr.jaxpr),
        time.monotonic() - began,
        peak,
        text,
        _largest(setup),
    )


def compile_held_out(experiment: Experiment, mesh: Mesh) -> dict[str, Memory]:
    """Compiles the evaluation of every held-out dataset in its microbatches.

    Returns: {dataset: memory}, including the optimizer's moments, which stay in memory
      meanwhile.
    Raises: as `compile_program`.
    """
    check_batches(experiment, mesh)
    setup, task = make_setup(experiment, mesh), stages.make_task(experiment)
    # Bytes of the optimizer's moments on one device.
    beside = sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(setup.state.optimizer)
    )
    found: dict[str, Memory] = {}
    for name, batch in batch_shapes(experiment, mesh, held_out=True).items():
        losses = make_held_out_loss(setup.graph, task, experiment.held_out[name].microbatches)
        with jax.set_mesh(mesh):
            _, memory = _compile(jax.jit(losses).trace(setup.trainable, setup.frozen, batch), mesh)
        found[name] = memory._replace(arguments=memory.arguments + beside)
    return found


def _compile(traced: jax.stages.Traced, mesh: Mesh) -> tuple[jax.stages.Compiled, Memory]:
    compiled = compile_for(traced, mesh)
    return compiled, memory_of(compiled)


def compile_for(traced: jax.stages.Traced, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles a traced program for the devices of a mesh, which need not exist.

    Raises: DoesNotFit if the memory of a device is too small.
    """
    try:
        with jax.set_mesh(mesh):
            return compile_traced(traced, mesh.devices.flat[0].platform)
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler refuses programs that do not fit into the memory of a chip.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_needed(str(error))) from error


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """Reads the compiler's analysis of a program's memory on each device."""
    analysis = compiled.memory_analysis()
    assert analysis is not None, "every XLA backend has it"
    # The state is donated: its new values reuse the memory of the old ones.
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Memory(analysis.argument_size_in_bytes, results, analysis.temp_size_in_bytes)


TOP = 8
"""How many of the largest arrays are reported."""


def _largest(setup: TrainSetup) -> list[dict[str, Any]]:
    held = {
        "trained": setup.trainable,
        "frozen": setup.frozen,
        "moments": optax.tree.get(setup.state.optimizer, "mu"),
    }
    found = []
    for role, arrays in held.items():
        for name, a in (arrays or {}).items():
            shape = a.sharding.shard_shape(a.shape)
            # Adam has two moments of the same shape.
            size = math.prod(shape) * a.dtype.itemsize * (2 if role == "moments" else 1)
            found.append(
                {
                    "name": f"{name} ({role})",
                    "sharding": str(tuple(a.sharding.spec)),
                    "bytes": size,
                }
            )
    return sorted(found, key=lambda tensor: -tensor["bytes"])[:TOP]


def _needed(message: str) -> int:
    """Returns the largest size in the compiler's error message, such as "83.93G", in bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max(
        (
            int(float(number) * units[unit])
            for number, unit in re.findall(r"\b(\d+(?:\.\d+)?)([KMG])\b", message)
        ),
        default=0,
    )


def smaller(experiment: Experiment, mesh: Mesh) -> Iterator[tuple[str, Experiment]]:
    """Yields (flags, experiment) with less and less memory, the fastest first; the flags turn
    the original experiment into this one.
    """
    training, shards = experiment.training, math.prod(mesh.shape[axis] for axis in ROWS)
    modes: tuple[Literal["products", "layers"], ...] = ("products", "layers")
    for remat in modes[{"none": 0, "products": 1, "layers": 2}[training.remat] :]:
        yield (
            f"--config.training.remat={remat}",
            dataclasses.replace(experiment, training=dataclasses.replace(training, remat=remat)),
        )
    for parts in (2, 4, 8, 16):
        data = {
            name: dataclasses.replace(dataset, microbatches=dataset.microbatches * parts)
            for name, dataset in experiment.data.items()
        }
        if all(
            dataset.batch_size % (shards * dataset.microbatches) == 0 for dataset in data.values()
        ):
            options = [
                "--config.training.remat=products",
                *(
                    f"--config.data.{name}.microbatches={d.microbatches}"
                    for name, d in data.items()
                ),
            ]
            yield (
                " ".join(options),
                dataclasses.replace(
                    experiment, data=data, training=dataclasses.replace(training, remat="products")
                ),
            )


def full_work(experiment: Experiment) -> Work:
    """Returns the work of an update in which all rows are full and have all their visuals and
    frames.
    """
    works = [_full_work(experiment, dataset) for dataset in experiment.data.values()]
    return Work(*(sum(counts) for counts in zip(*works, strict=True)))


def _full_work(experiment: Experiment, dataset: DatasetConfig) -> Work:
    rows = dataset.batch_size
    if experiment.task == "contrastive":
        return Work(rows * _text_length(experiment), 0, rows, rows)
    tokens = rows * dataset.max_length
    if dataset.kind == "text" or experiment.task == "language_modelling":
        return Work(tokens)
    return Work(tokens, tokens, rows * dataset.visuals, rows * dataset.visuals * dataset.frames)


def batch_shapes(
    experiment: Experiment, mesh: Mesh, held_out: bool = False
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns {dataset: {array: shape, dtype and sharding}} of global batches, as
    `data_pipelines.batches` makes them. held_out: those of held-out datasets, never augmented.
    """
    datasets = (
        {name: dataclasses.replace(d, colour=0.0) for name, d in experiment.held_out.items()}
        if held_out
        else experiment.data
    )
    found = {name: _batch_shapes(experiment, dataset, mesh) for name, dataset in datasets.items()}

    def placed(shapes: dict[str, Any], shardings: dict[str, Any]) -> dict[str, Any]:
        return {
            name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name])
            for name, s in shapes.items()
        }

    return {name: placed(shapes, batch_shardings(shapes, mesh)) for name, shapes in found.items()}


def _batch_shapes(
    experiment: Experiment, dataset: DatasetConfig, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    def array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, length, number, flag, byte = (
        dataset.batch_size,
        dataset.max_length,
        jnp.int32,
        jnp.bool_,
        jnp.uint8,
    )
    if experiment.task == "contrastive":
        size, text = stages.model_config(experiment).vision.image_size, _text_length(experiment)
        batch = {
            "images": array(byte, rows, size, size, 3),
            "tokens": array(number, rows, text),
            "mask": array(flag, rows, text),
        }
        return batch | ({"jitter": array(jnp.float32, rows, len(FIELDS))} if dataset.colour else {})
    batch = {name: array(number, rows, length) for name in ("tokens", "positions", "segments")} | {
        "loss_mask": array(flag, rows, length)
    }
    if experiment.task == "language_modelling":
        return batch
    batch["media_index"] = array(number, rows, length)
    if dataset.kind == "text":
        return batch
    visuals, size = (
        HostShard.of(mesh).listed(rows, dataset.visuals),
        stages.model_config(experiment).vision.image_size,
    )
    return batch | {
        "visuals": array(number, rows, dataset.visuals),
        "frame_mask": array(flag, visuals, dataset.frames),
        "images": array(byte, visuals, dataset.frames, size, size, 3),
        **(
            {"jitter": array(jnp.float32, visuals, dataset.frames, len(FIELDS))}
            if dataset.colour
            else {}
        ),
    }


def _text_length(experiment: Experiment) -> int:
    return stages.model_config(experiment).text.max_length


def floor_seconds(program: Program, chips: int, flops: float) -> float:
    """Returns the least seconds of a step: the formula's FLOPs at the peak of `chips` chips,
    each `flops` a second.
    """
    return program.formula_flops / (chips * flops)
