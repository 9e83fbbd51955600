"""What a config amounts to, before a machine is rented.

    python -m launch.plan --config=configs/flamingo_80b.py --counts [--json]
    python -m launch.plan --config=configs/flamingo_3b.py --topology=v4:2x2x4 [--json]

`--counts` gives the parameters of every part of the model, from the real modules but without allocating anything. `--topology` compiles the
training step for that machine, which need not be there, and says for each device what memory it takes, how many FLOPs and the compiler's own
estimate of its cycles, and what it sends to others.
"""

import json
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.planning.counts import count_parameters
from flamingo_jax.planning.hlo import summarise
from flamingo_jax.planning.program import compile_program, floor_seconds
from flamingo_jax.planning.topology import open_topology
from launch import command

COUNTS = flags.DEFINE_bool("counts", False, "Count the parameters.")
TOPOLOGY = flags.DEFINE_string("topology", "", "Machine to compile the step for, as v4:2x2x4: a kind of chip and the sizes of its torus.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
CONFIG = command.define_config()
GIB = 2**30


def main() -> int:
    experiment = command.experiment(CONFIG)
    if not COUNTS.value and not TOPOLOGY.value:
        raise UserError("nothing to plan: add --counts or --topology=v4:2x2x4")
    plan: dict[str, Any] = {"parameters": count_parameters(experiment)} if COUNTS.value else {}
    if TOPOLOGY.value:
        plan["step"] = plan_step(experiment, TOPOLOGY.value)
    if JSON.value:
        print(json.dumps(plan))
        return 0
    for made in ([_counts_table(experiment, plan["parameters"])] if COUNTS.value else []) + (_step_tables(plan["step"]) if TOPOLOGY.value else []):
        Console().print(made)
    return 0


def plan_step(experiment: Experiment, name: str) -> dict[str, Any]:
    """The step compiled for a topology, as JSON-able figures; bytes and cycles are those of one device."""
    topology = open_topology(name)
    mesh = topology.mesh(experiment.mesh)
    program = compile_program(experiment, mesh)
    summary = summarise(program.hlo)
    chips = len(topology.devices)
    floor = floor_seconds(program, chips, topology.chip.flops)
    return {
        "topology": name,
        "chips": chips,
        "mesh": dict(mesh.shape),
        "bytes": {"arguments": program.memory.arguments, "results": program.memory.results, "temporaries": program.memory.temporaries},
        "peak_bytes": program.memory.peak,
        "chip_bytes": topology.chip.memory,
        "fits": program.memory.peak <= topology.chip.memory,
        "flops": {"formula": program.formula_flops, "jaxpr": program.jaxpr_flops},
        "floor_seconds": floor,
        "estimated_cycles": summary.cycles,
        "collectives": [c._asdict() for c in sorted(summary.collectives, key=lambda c: -c.bytes * c.times)],
        "instructions": summary.instructions,
        "compile_seconds": program.seconds,
        "compiler_bytes": program.compiler_bytes,
    }


def _counts_table(experiment: Experiment, counts: dict[str, int]) -> Table:
    table = Table("part", title=experiment.name or experiment.task)
    table.add_column("parameters", justify="right")
    table.add_column("", justify="right")
    for part, count in counts.items():
        if part == "trainable":
            table.add_section()
        table.add_row(part.replace("_", " "), f"{count:,}", _short(count))
    return table


TOP = 12
"""Collectives shown in the table; JSON has all."""


def _step_tables(step: dict[str, Any]) -> list[Table]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in step["mesh"].items())
    table = Table("", title=f"one step on {step['chips']} chips, {step['topology']}, mesh {mesh}")
    table.add_column("", justify="right")
    for part, count in step["bytes"].items():
        table.add_row(f"{part}, a device", f"{count / GIB:.2f} GiB")
    verdict = "fits" if step["fits"] else "[bold]does not fit[/bold]"
    table.add_row("peak of the chip's memory", f"{step['peak_bytes'] / GIB:.2f} of {step['chip_bytes'] / GIB:.2f} GiB: {verdict}")
    table.add_section()
    ratio = step["flops"]["jaxpr"] / max(step["flops"]["formula"], 1)
    table.add_row("FLOPs by the formula, full rows", f"{step['flops']['formula']:.4g}")
    table.add_row("FLOPs of the traced step", f"{step['flops']['jaxpr']:.4g} ({ratio:.2f} x)")
    table.add_row("least time, at the chips' peak", f"{step['floor_seconds']:.3f} s")
    table.add_row("the compiler's cycles", f"{step['estimated_cycles']:.4g}" if step["estimated_cycles"] else "not given")
    table.add_row("compiled in", f"{step['compile_seconds']:.0f} s with {step['compiler_bytes'] / GIB:.1f} GiB")
    sent = Table("collective", "groups", title="sent between devices, the largest first")
    for column in ("MiB", "times a step", "GiB a step"):
        sent.add_column(column, justify="right")
    for c in step["collectives"][:TOP]:
        sent.add_row(c["kind"], c["groups"][:40], f"{c['bytes'] / 2**20:.1f}", str(c["times"]), f"{c['bytes'] * c['times'] / GIB:.2f}")
    return [table, sent]


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


if __name__ == "__main__":
    command.run(main)
