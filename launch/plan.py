"""What a config amounts to, before a machine is rented.

    python -m launch.plan --config=configs/flamingo_80b.py --counts [--json]
    python -m launch.plan --config=configs/flamingo_3b.py --topology=v4:2x2x4 [--json]

`--counts` gives the parameters of every part of the model, from the real modules but without
allocating anything, and both say how large a
checkpoint is: what is trained and its moments, since frozen parameters stay in the exports they
came from. `--topology` compiles the training step for that machine, which need not be there,
and says for each device what memory it takes, how many FLOPs and the compiler's own estimate of
its cycles, what it sends to others, and how long the run should take. Where the step does not
fit, `--search` tries what would. `--held_out` says the same of the memory that evaluation
takes.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.planning.counts import checkpoint_bytes, count_parameters
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
from launch import command

COUNTS = flags.DEFINE_bool("counts", False, "Count the parameters.")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    "",
    "Machine to compile the step for, as v4:2x2x4: a kind of chip and its torus; 2*v4:2x2x4 is"
    " two slices.",
)
SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Where the step does not fit, compile what needs less memory until it does: minutes for"
    " each try.",
)
HELD_OUT = flags.DEFINE_bool(
    "held_out",
    False,
    "With --topology: compile the evaluation of each held-out dataset too, which has a memory"
    " of its own.",
)
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
CONFIG = command.define_config()
GIB = 2**30
NUMBERS = {"B": 1e9, "M": 1e6, "k": 1e3}
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1}


def main() -> int:
    experiment = command.experiment(CONFIG)
    if not COUNTS.value and not TOPOLOGY.value:
        raise UserError("nothing to plan: add --counts or --topology=v4:2x2x4")
    if (SEARCH.value or HELD_OUT.value) and not TOPOLOGY.value:
        raise UserError("--search and --held_out compile for a machine: add --topology=v4:2x2x4")
    plan: dict[str, Any] = {"parameters": count_parameters(experiment)} if COUNTS.value else {}
    plan["checkpoint"] = checkpoint_bytes(experiment)
    if TOPOLOGY.value:
        plan["step"] = plan_step(experiment, TOPOLOGY.value, SEARCH.value)
        if HELD_OUT.value:
            plan["held_out"] = plan_held_out(experiment, TOPOLOGY.value)
    if JSON.value:
        print(json.dumps(plan))
        return 0
    tables = [_counts_table(experiment, plan["parameters"])] if COUNTS.value else []
    tables += _step_tables(plan["step"]) if TOPOLOGY.value else []
    tables += [_held_out_table(plan["held_out"])] if "held_out" in plan else []
    for made in [*tables, _checkpoint_table(plan["checkpoint"])]:
        Console().print(made)
    return 0


def plan_step(experiment: Experiment, name: str, search: bool = False) -> dict[str, Any]:
    """The step compiled for a topology, as JSON-able figures; bytes, cycles and program FLOPs
    are those of one device.

    Raises: UserError with the mend where the step does not fit.
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
    sent = _by_axes(summary.collectives, mesh)
    computing, sending = (
        summary.cycles / chip.clock,
        sum(kind["bytes"] for kind in sent) / chip.link,
    )
    # Whether what is sent hides behind the computing is not known before a run: no overlap at
    # all is the safe side.
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
    """Bytes of a device while each held-out dataset is evaluated, moments beside it:
    {"peak_bytes": {dataset: bytes}, "chip_bytes", "fits"}.

    Raises: UserError with the mend where the compiler finds no way to fit one.
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


def _held_out_table(held_out: dict[str, Any]) -> Table:
    table = Table("held-out dataset", title="evaluation")
    table.add_column("peak of the chip's memory", justify="right")
    for name, peak in held_out["peak_bytes"].items():
        verdict = "fits" if peak <= held_out["chip_bytes"] else "[bold]does not fit[/bold]"
        table.add_row(
            name, f"{peak / GIB:.2f} of {held_out['chip_bytes'] / GIB:.2f} GiB: {verdict}"
        )
    return table


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


def _by_axes(collectives: Sequence[Collective], mesh: Mesh) -> list[dict[str, Any]]:
    """Collectives by kind and the axes of the mesh that they cross, the most bytes first."""
    found: dict[tuple[str, str], list[int]] = {}
    for c in collectives:
        places = np.unravel_index(
            np.asarray(c.group or range(mesh.size)), tuple(mesh.shape.values())
        )
        axes = (
            " x ".join(
                axis for axis, place in zip(mesh.shape, places, strict=True) if np.ptp(place)
            )
            or "none"
        )
        counts = found.setdefault((c.kind, axes), [0, 0, 0])
        counts[0] += c.times
        counts[1] += c.times * c.bytes
        counts[2] = max(counts[2], c.bytes)
    sent = [
        {"kind": kind, "axes": axes, "times": times, "bytes": total, "largest": most}
        for (kind, axes), (times, total, most) in found.items()
    ]
    return sorted(sent, key=lambda kind: -kind["bytes"])


def _counts_table(experiment: Experiment, counts: dict[str, int]) -> Table:
    table = Table("part", title=experiment.name or experiment.task)
    table.add_column("parameters", justify="right")
    table.add_column("", justify="right")
    for part, count in counts.items():
        if part == "trainable":
            table.add_section()
        table.add_row(part.replace("_", " "), f"{count:,}", _short(count))
    return table


def _checkpoint_table(sizes: dict[str, int]) -> Table:
    table = Table("", title="a checkpoint")
    table.add_column("", justify="right")
    rest = ("step, key and counters", "rest")
    for name, key in (
        ("trained parameters, float32", "trainables"),
        ("their moments, float32", "moments"),
        rest,
        ("the whole checkpoint", "total"),
    ):
        if key == "total":
            table.add_section()
        table.add_row(name, _short(sizes[key], BYTES))
    table.add_section()
    table.add_row("frozen parameters, not in it", _short(sizes["frozen"], BYTES))
    return table


def _step_tables(step: dict[str, Any]) -> list[Table]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in step["mesh"].items())
    table = Table("", title=f"one step on {step['chips']} chips, {step['topology']}, mesh {mesh}")
    table.add_column("", justify="right")
    if step["change"]:
        table.add_row("fits with", step["change"])
    for part, count in step["bytes"].items():
        table.add_row(f"{part}, a device", f"{count / GIB:.2f} GiB")
    verdict = "fits" if step["fits"] else "[bold]does not fit[/bold]"
    table.add_row(
        "peak of the chip's memory",
        f"{step['peak_bytes'] / GIB:.2f} of {step['chip_bytes'] / GIB:.2f} GiB: {verdict}",
    )
    table.add_section()
    formula = step["flops"]["formula"]
    table.add_row("FLOPs by the formula, full rows", f"{formula:.4g}")
    for name, key in (("of the traced step", "jaxpr"), ("of the compiled program", "program")):
        table.add_row(
            f"FLOPs {name}",
            f"{step['flops'][key]:.4g} ({step['flops'][key] / max(formula, 1):.2f} x)",
        )
    table.add_section()
    table.add_row("least time, at the chips' peak", f"{step['floor_seconds']:.3f} s")
    table.add_row(
        "computing, by the compiler's cycles",
        f"{step['seconds']['computing']:.3f} s ({step['cycles_over_floor']:.2f} x)",
    )
    table.add_row("sending, at the links' rate", f"{step['seconds']['sending']:.3f} s")
    table.add_row(
        "a step with no overlap", f"{step['seconds']['step']:.3f} s, {step['mfu']:.0%} MFU"
    )
    table.add_row("the run", f"{step['days']:.1f} days, {step['chip_hours']:,.0f} chip-hours")
    table.add_row(
        "compiled in",
        f"{step['compile_seconds']:.0f} s with {step['compiler_bytes'] / GIB:.1f} GiB",
    )
    sent = Table("collective", "axes", title="sent between devices in a step")
    for column in ("times", "GiB", "largest, MiB"):
        sent.add_column(column, justify="right")
    for c in step["collectives"]:
        sent.add_row(
            c["kind"],
            c["axes"],
            str(c["times"]),
            f"{c['bytes'] / GIB:.2f}",
            f"{c['largest'] / 2**20:.1f}",
        )
    held = Table("tensor", "sharding", title="the largest that each device holds between steps")
    held.add_column("GiB", justify="right")
    for tensor in step["largest"]:
        held.add_row(tensor["name"], tensor["sharding"], f"{tensor['bytes'] / GIB:.2f}")
    return [table, held, sent]


def _short(count: int, units: Mapping[str, float] = NUMBERS) -> str:
    for unit, size in units.items():
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


if __name__ == "__main__":
    command.run(main)
