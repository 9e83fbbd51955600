"""Plans a run before a machine is rented: parameters, memory, FLOPs, communication and time.

    python -m launch.plan --config=configs/flamingo_80b.py --counts [--json]
    python -m launch.plan --config=configs/flamingo_3b.py --topology=v4:2x2x4 [--json]

`--counts` counts the parameters of every part of the model, from the real modules but without
allocating arrays. `--topology` compiles the training step for that machine, without having it,
and prints the memory of each device, FLOPs, the compiler's estimate of cycles, the
communication between devices, and how long the run should take. If the step does not fit,
`--search` tries forms that need less memory. `--held_out` also reports the memory of the
evaluation.

Both print the size of a checkpoint: trained parameters and their moments, since frozen
parameters stay in the exports they came from.
"""

import json
from typing import Any

from absl import flags

from flamingo_jax.errors import UserError
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


def main() -> int:
    experiment = command.experiment(CONFIG)
    if not COUNTS.value and not TOPOLOGY.value:
        raise UserError("nothing to plan: add --counts or --topology=v4:2x2x4")
    if (SEARCH.value or HELD_OUT.value) and not TOPOLOGY.value:
        raise UserError("--search and --held_out compile for a machine: add --topology=v4:2x2x4")
    from rich.console import Console

    from flamingo_jax.planning import tables
    from flamingo_jax.planning.counts import checkpoint_bytes, count_parameters, count_parts

    plan: dict[str, Any] = {}
    if COUNTS.value:
        parts = count_parts(experiment)
        trained = {part: count.trained for part, count in parts.items()}
        plan |= {"parameters": count_parameters(experiment), "trained": trained}
    plan["checkpoint"] = checkpoint_bytes(experiment)
    if TOPOLOGY.value:
        from flamingo_jax.planning.plan import plan_held_out, plan_step

        plan["step"] = plan_step(experiment, TOPOLOGY.value, SEARCH.value)
        if HELD_OUT.value:
            plan["held_out"] = plan_held_out(experiment, TOPOLOGY.value)
    if JSON.value:
        print(json.dumps(plan))
        return 0
    shown = [tables.counts_table(experiment, parts)] if COUNTS.value else []
    shown += tables.step_tables(plan["step"]) if TOPOLOGY.value else []
    shown += [tables.held_out_table(plan["held_out"])] if "held_out" in plan else []
    for table in [*shown, tables.checkpoint_table(plan["checkpoint"])]:
        Console().print(table)
    return 0


if __name__ == "__main__":
    command.run(main)
