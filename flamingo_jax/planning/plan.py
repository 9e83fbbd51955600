"""Plans a training step for a machine that need not exist: memory, FLOPs, time,
communication.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.planning.hlo import Collective, summarise
from flamingo_jax.planning.program import (
    DoesNotFit,
    Program,
    compile_held_out,
    compile_program,
    floor_seconds,
    smaller,
)
from flamingo_jax.planning.topology import open_topology

GIB = 2**30


def plan_step(experiment: Experiment, name: str, search: bool = False) -> dict[str, Any]:
    """Compiles the training step for a topology and returns its costs, JSON-able.

    Bytes and cycles are those of one device, FLOPs of all devices together. "floor_seconds" is
    the time that the formula's FLOPs take at the chips' peak.

    Args:
      name: of the topology, such as "v4:2x2x4".
      search: whether to try forms that need less memory if the step does not fit.

    Raises: UserError with a suggestion if the step does not fit.
    """
    topology = open_topology(name)
    mesh = topology.mesh(experiment.mesh)
    change = ""
    try:
        program = compile_program(experiment, mesh)
    except DoesNotFit as error:
        if not search:
            raise UserError(
                f"{error}, but a {topology.kind} has {topology.chip.memory / GIB:.2f} GiB: add"
                " --search to find what fits"
            ) from None
        change, experiment, program = _fitting(experiment, mesh)
    summary = summarise(program.hlo)
    chips, chip = len(topology.devices), topology.chip
    floor = floor_seconds(program, chips, chip.flops)
    sent = by_axes(summary.collectives, mesh)
    computing, sending = (
        summary.cycles / chip.clock,
        sum(kind["bytes"] for kind in sent) / chip.link,
    )
    # How much communication overlaps with computation is not known before a run; assuming no
    # overlap at all errs on the safe side.
    seconds = computing + sending
    return {
        "topology": name,
        "chips": chips,
        "mesh": dict(mesh.shape),
        "change": change,
        "bytes": {
            "arguments": program.memory.arguments,
            "results": program.memory.results,
            "temporaries": program.memory.temporaries,
        },
        "peak_bytes": program.memory.peak,
        "chip_bytes": chip.memory,
        "fits": program.memory.peak <= chip.memory,
        "largest": program.largest,
        "flops": {
            "formula": program.formula_flops,
            "jaxpr": program.jaxpr_flops,
            "program": summary.flops * chips,
        },
        "floor_seconds": floor,
        "estimated_cycles": summary.cycles,
        "cycles_over_floor": computing / floor,
        "seconds": {"computing": computing, "sending": sending, "step": seconds},
        "mfu": floor / seconds if seconds else 0.0,
        "days": seconds * experiment.training.steps / 86_400,
        "chip_hours": seconds * experiment.training.steps / 3_600 * chips,
        "collectives": sent,
        "instructions": summary.instructions,
        "compile_seconds": program.seconds,
        "compiler_bytes": program.compiler_bytes,
    }


def plan_held_out(experiment: Experiment, name: str) -> dict[str, Any]:
    """Computes the peak memory of a device during the evaluation of each held-out dataset,
    with the optimizer's moments in memory.

    Returns: {"peak_bytes": {dataset: bytes}, "chip_bytes", "fits"}.
    Raises: UserError with a suggestion if the compiler cannot make one of them fit.
    """
    topology = open_topology(name)
    try:
        memories = compile_held_out(experiment, topology.mesh(experiment.mesh))
    except DoesNotFit as error:
        mend = "raise config.held_out.NAME.microbatches, or take smaller held-out batches"
        raise UserError(
            f"evaluation: {error}, but a {topology.kind} has {topology.chip.memory / GIB:.2f}"
            f" GiB: {mend}"
        ) from None
    peaks = {dataset: memory.peak for dataset, memory in memories.items()}
    return {
        "peak_bytes": peaks,
        "chip_bytes": topology.chip.memory,
        "fits": all(peak <= topology.chip.memory for peak in peaks.values()),
    }


def _fitting(experiment: Experiment, mesh: Mesh) -> tuple[str, Experiment, Program]:
    for change, tried in smaller(experiment, mesh):
        print(f"compiling with {change}", file=sys.stderr, flush=True)
        try:
            return change, tried, compile_program(tried, mesh)
        except DoesNotFit as error:
            print(f"  {error}", file=sys.stderr, flush=True)
    raise UserError(
        "nothing that was tried fits: shard more (config.mesh.fsdp, config.mesh.model), or take"
        " more chips or a smaller batch"
    )


def by_axes(collectives: Sequence[Collective], mesh: Mesh) -> list[dict[str, Any]]:
    """Sums collectives by kind and by the mesh axes that they cross, largest total first."""
    found: dict[tuple[str, str], list[int]] = {}
    for c in collectives:
        places = np.unravel_index(
            np.asarray(c.group or range(mesh.size)), tuple(mesh.shape.values())
        )
        # A group crosses an axis if the coordinates of its devices differ along it.
        axes = (
            " x ".join(
                axis for axis, place in zip(mesh.shape, places, strict=True) if np.ptp(place)
            )
            or "none"
        )
        # Calls in a step, bytes in a step, bytes of the largest call.
        counts = found.setdefault((c.kind, axes), [0, 0, 0])
        counts[0] += c.times
        counts[1] += c.times * c.bytes
        counts[2] = max(counts[2], c.bytes)
    sent = [
        {"kind": kind, "axes": axes, "times": times, "bytes": total, "largest": most}
        for (kind, axes), (times, total, most) in found.items()
    ]
    return sorted(sent, key=lambda kind: -kind["bytes"])
