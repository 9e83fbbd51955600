"""Inference compiled ahead of time, from shapes alone, for a mesh of devices that need not
exist: the vision encoder with the resampler, the cross-attention's keys and values, the prompts'
prefill, and one decoding step. `planning` reads memory, FLOPs and sends from these.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference import programs
from flamingo_jax.inference.decoding import next_logits
from flamingo_jax.inference.loading import build_model
from flamingo_jax.inference.placement import check_mesh, parameter_shardings
from flamingo_jax.inference.prefill import PromptArrays
from flamingo_jax.inference.rows import RowOptions, Rows
from flamingo_jax.partitioning import rules
from flamingo_jax.partitioning.mesh import AXES, DATA, FSDP, ROWS
from flamingo_jax.pytrees import from_flat, to_flat
from flamingo_jax.weight_parts import weight_part

Array = jax.Array
Compile = Callable[[jax.stages.Traced], jax.stages.Compiled]


class InferenceSize(NamedTuple):
    """The sizes of a batch.

    rows: prompts at a time (times beams), a multiple of the mesh's data * fsdp.
    prompt_tokens, new_tokens: of each row; the cache has as many slots as both together.
    visuals: images or clips of each row. frames: of each.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    visuals: int = 1
    frames: int = 1


class Step(NamedTuple):
    """One program of inference. arguments: the shapes, dtypes and shardings that it takes."""

    traced: jax.stages.Traced
    compiled: jax.stages.Compiled
    arguments: tuple[Any, ...]


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _decode(graph: Any, state: nnx.State, cache: Any, rows: Rows) -> Any:
    """Decodes one token of every row; the cache is updated in place."""
    return next_logits(
        nnx.merge(graph, state),
        rows.token[:, None],
        rows.position[:, None],
        rows.media_index,
        rows.media,
        rows.visuals,
        cache,
    )


def abstract_parameters(
    config: FlamingoConfig,
    mesh: Mesh,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    memory: int | None = None,
    frozen_dtype: str | None = None,
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """Describes a model's parameters as `load` would read them: (graph, {flat name: shape,
    dtype and sharding}). Trained parameters are float32 and frozen ones of the compute dtype, as
    a run exports them.

    Args:
      dtype: the compute dtype.
      memory: bytes of each device, which decide whether frozen weights are gathered.
      frozen_dtype: "int8" for integers in language model and vision encoder.

    Raises: UserError where the mesh does not fit the model, or the weights the memory.
    """
    check_mesh(config, mesh)
    model = nnx.eval_shape(lambda: build_model(config, dtype, frozen_dtype))
    graph, state = nnx.split(model)
    found = to_flat(state)
    trained = rules.trainable_names("flamingo", found)

    def stored(name: str, made: DTypeLike) -> DTypeLike:
        # Integers and their scales are as they are made.
        return made if weight_part(name) else jnp.float32 if name in trained else dtype

    declared = {
        name: jax.ShapeDtypeStruct(s.shape, stored(name, s.dtype)) for name, s in found.items()
    }
    shardings = parameter_shardings(declared, mesh, memory)
    return graph, {name: s.update(sharding=shardings[name]) for name, s in declared.items()}


def compile_steps(
    config: FlamingoConfig,
    mesh: Mesh,
    size: InferenceSize,
    compile_traced: Compile,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    memory: int | None = None,
    frozen_dtype: str | None = None,
    encoder: bool = True,
) -> dict[str, Step]:
    """Compiles the programs of inference for a mesh, without allocating anything.

    Each takes what the one before leaves on the devices, in the shardings that the compiler
    chose: {"encode", "prepare", "prefill", "decode": step}.

    Args:
      compile_traced: compiles a traced program; called with the mesh set.
      dtype, memory, frozen_dtype: as for `abstract_parameters`.
      encoder: False leaves "encode" out, which takes the compiler the longest.

    Raises: UserError as `abstract_parameters`, and for rows that do not divide over the mesh.
    """
    shards = mesh.shape[DATA] * mesh.shape[FSDP]
    if size.rows % shards:
        raise UserError(
            f"{size.rows} rows do not divide over the {shards} row shards of the mesh (data x"
            f" fsdp): make them a multiple of {shards}"
        )
    graph, parameters = abstract_parameters(
        config, mesh, dtype, memory=memory, frozen_dtype=frozen_dtype
    )
    state = nnx.State(from_flat(parameters))

    def array(dtype: DTypeLike, spec: PartitionSpec, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def step(program: Any, *arguments: Any) -> Step:
        with jax.set_mesh(mesh):
            traced = program.trace(*arguments)
            return Step(traced, compile_traced(traced), arguments)

    by_row, whole = PartitionSpec(ROWS), PartitionSpec()
    rows, length, visuals = size.rows, size.prompt_tokens, size.rows * size.visuals
    side, listed = config.vision.image_size, -(-visuals // mesh.size) * mesh.size
    images = array(jnp.uint8, PartitionSpec(AXES), listed, size.frames, side, side, 3)
    frame_mask = array(jnp.bool_, PartitionSpec(AXES), listed, size.frames)
    steps: dict[str, Step] = {}
    if encoder:
        steps["encode"] = step(programs.encode_visuals, graph, state, images, frame_mask)
    latents, width = config.resampler.latents, config.language_model.width
    tokens = array(dtype, whole, visuals, latents, width)
    steps["prepare"] = step(programs.prepare_media, graph, state, tokens)
    media = _left_by(steps["prepare"])
    prompts = PromptArrays(
        array(jnp.int32, by_row, rows, length),
        array(jnp.int32, by_row, rows, length),
        array(jnp.int32, by_row, rows),
        array(jnp.int32, by_row, rows, size.visuals),
    )
    options = RowOptions(
        array(jnp.uint32, by_row, rows, 2),
        array(jnp.int32, by_row, rows),
        array(jnp.float32, by_row, rows),
        array(jnp.float32, by_row, rows),
    )
    slots = length + size.new_tokens
    steps["prefill"] = step(programs.start_rows, graph, state, prompts, media, options, slots)
    read = _left_by(steps["prefill"])
    steps["decode"] = step(_decode, graph, state, read.cache, read._replace(cache=None))
    return steps


def _left_by(step: Step) -> Any:
    """Returns the shapes and shardings of what a program leaves on the devices."""
    return jax.tree.map(
        lambda info, sharding: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding),
        step.compiled.out_info,
        step.compiled.output_shardings,
    )
