"""Compiles the programs of inference ahead of time for a TPU topology, and reads the compiler's
analysis of memory, FLOPs, cycles and sends.
"""

import time
from typing import Any

import jax
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.ahead_of_time import InferenceSize, compile_steps
from flamingo_jax.partitioning.mesh import AXES
from flamingo_jax.planning.hlo import summarise
from flamingo_jax.planning.inference import COMPUTE, InferenceLoad
from flamingo_jax.planning.plan import GIB, by_axes
from flamingo_jax.planning.program import DoesNotFit, compile_for, memory_of
from flamingo_jax.planning.topology import open_topology


def compile_inference(
    config: FlamingoConfig,
    machine: str,
    sizes: dict[str, int],
    load: InferenceLoad,
    frozen_dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Compiles encoding, projecting, prefill and a decoding step of as many rows as the load has
    hypotheses.

    Args:
      machine: of TPUs, such as "v4:2x2x4".
      sizes: of the mesh's axes.

    Returns: {program: its costs}, JSON-able; bytes, cycles and seconds are those of a device,
      FLOPs those of all together.

    Raises: UserError where libtpu is missing, or a program does not fit the chip's memory.
    """
    topology = open_topology(machine)
    mesh = topology.mesh(",".join(f"{axis}={sizes[axis]}" for axis in AXES))
    shards = mesh.size // sizes["model"]
    rows = -(-load.batch * load.beams // shards) * shards
    size = InferenceSize(
        rows, load.prompt_tokens, load.new_tokens, max(load.visuals, 1), load.frames
    )
    found: dict[str, Any] = {}
    began = time.monotonic()

    def compile_one(traced: jax.stages.Traced) -> jax.stages.Compiled:
        nonlocal began
        try:
            compiled = compile_for(traced, mesh)
        except DoesNotFit as error:
            raise UserError(
                f"inference: {error}, but a {topology.kind} has"
                f" {topology.chip.memory / GIB:.2f} GiB: take more chips, a smaller batch or"
                " shorter prompts"
            ) from None
        found[f"program {len(found)}"] = _costs(compiled, mesh, topology.chip.clock) | {
            "lowered_lines": traced.lower().as_text().count("\n"),
            "compile_seconds": time.monotonic() - began,
        }
        began = time.monotonic()
        return compiled

    steps = compile_steps(
        config,
        mesh,
        size,
        compile_one,
        COMPUTE,
        memory=topology.chip.memory,
        frozen_dtype=frozen_dtype,
    )
    return dict(zip(steps, found.values(), strict=True))


def _costs(compiled: jax.stages.Compiled, mesh: Mesh, clock: float) -> dict[str, Any]:
    text = compiled.as_text()
    assert text is not None, "every XLA backend has it"
    memory, summary = memory_of(compiled), summarise(text)
    return {
        "bytes": memory._asdict(),
        "peak_bytes": memory.peak,
        "flops": summary.flops * mesh.size,
        "computing_seconds": summary.cycles / clock,
        "sent": by_axes(summary.collectives, mesh),
        "instructions": summary.instructions,
    }
