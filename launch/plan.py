"""Plans a run before a machine is rented: parameters, memory, FLOPs, communication and time.

    python -m launch.plan --config=configs/flamingo_80b.py --counts [--json]
    python -m launch.plan --config=configs/flamingo_3b.py --topology=v4:2x2x4 [--json]
    python -m launch.plan --config=configs/flamingo_80b.py --topology=h200_8 --inference [--json]

`--counts` counts the parameters of every part of the model, from the real modules but without
allocating arrays. `--topology` compiles the training step for that machine, without having it,
and prints the memory of each device, FLOPs, the compiler's estimate of cycles, the
communication between devices, and how long the run should take. If the step does not fit,
`--search` tries forms that need less memory. `--held_out` also reports the memory of the
evaluation.

`--inference` plans the use of the model instead: the bytes that weights, cache and visuals take
of each device, the least time of a prompt and of a token, and what bounds them: memory, FLOPs or
links. For TPUs the programs are compiled too, where the compiler is installed.

The other two print the size of a checkpoint: trained parameters and their moments, since frozen
parameters stay in the exports they came from.
"""

import json
from typing import Any

from absl import flags

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
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
INFERENCE = flags.DEFINE_bool(
    "inference", False, "With --topology: plan the use of the model rather than its training."
)
COMPILE = flags.DEFINE_bool(
    "compile",
    None,
    "--inference: compile the programs for a TPU topology too, which takes minutes; by default"
    " where the compiler is installed.",
)
MESH = flags.DEFINE_string(
    "mesh",
    "",
    "--inference: devices along each axis, as data=2,model=4; by default as many over model as"
    " the heads allow.",
)
BATCH = flags.DEFINE_integer("batch", 1, "--inference: prompts at a time.", lower_bound=1)
PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", 512, "--inference: tokens of each prompt.", lower_bound=1
)
NEW_TOKENS = flags.DEFINE_integer(
    "new_tokens", 32, "--inference: tokens that are generated for each prompt.", lower_bound=1
)
VISUALS = flags.DEFINE_integer(
    "visuals", 5, "--inference: images or clips of each prompt.", lower_bound=0
)
FRAMES = flags.DEFINE_integer("frames", 1, "--inference: frames of each visual.", lower_bound=1)
BEAMS = flags.DEFINE_integer(
    "beams", 1, "--inference: hypotheses of beam search for each prompt.", lower_bound=1
)
FROZEN_DTYPE = flags.DEFINE_enum(
    "frozen_dtype",
    "bfloat16",
    ["bfloat16", "int8"],
    "--inference: of the matrices of language model and vision encoder.",
)
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
CONFIG = command.define_config()


READS = {
    "launch.plan --inference": (
        *("batch", "prompt_tokens", "new_tokens", "visuals", "frames", "beams"),
        *("mesh", "frozen_dtype", "compile"),
    ),
    "launch.plan": ("search", "held_out"),
}
"""{mode of the command: flags that only this mode reads}."""


def main() -> int:
    way = "launch.plan --inference" if INFERENCE.value else "launch.plan"
    command.reject_unused_flags(READS, way, command.given_flags())
    experiment = command.experiment(CONFIG)
    if not COUNTS.value and not TOPOLOGY.value:
        raise UserError("nothing to plan: add --counts or --topology=v4:2x2x4")
    if (SEARCH.value or HELD_OUT.value) and not TOPOLOGY.value:
        raise UserError("--search and --held_out compile for a machine: add --topology=v4:2x2x4")
    return inference(experiment) if INFERENCE.value else training(experiment)


def inference(experiment: Experiment) -> int:
    """Plans the use of a trained Flamingo."""
    if experiment.flamingo is None or COUNTS.value:
        raise UserError(
            "--inference plans the use of a Flamingo: name a config of one, and count its"
            " parameters by a call of its own"
        )
    if not TOPOLOGY.value:
        raise UserError("--inference plans for a machine: add --topology=h200_8 or v4:2x2x4")
    from rich.console import Console

    from flamingo_jax.planning.inference import InferenceLoad, plan_inference
    from flamingo_jax.planning.inference_tables import inference_tables
    from flamingo_jax.planning.topology import find_machine, has_libtpu

    machine = find_machine(TOPOLOGY.value)
    load = InferenceLoad(
        batch=BATCH.value,
        prompt_tokens=PROMPT_TOKENS.value,
        new_tokens=NEW_TOKENS.value,
        visuals=VISUALS.value,
        frames=FRAMES.value,
        beams=BEAMS.value,
    )
    plan = plan_inference(
        experiment.flamingo,
        machine,
        load,
        mesh=MESH.value,
        frozen_dtype=FROZEN_DTYPE.value,
    )
    compiles = COMPILE.value
    if compiles is None:
        compiles = machine.has_compiler and has_libtpu()
    if compiles:
        from flamingo_jax.planning.inference_program import compile_inference

        plan["programs"] = compile_inference(
            experiment.flamingo, machine.name, plan["mesh"], load, FROZEN_DTYPE.value
        )
    if JSON.value:
        print(json.dumps(plan))
        return 0
    for table in inference_tables(experiment.name, plan):
        Console().print(table)
    return 0


def training(experiment: Experiment) -> int:
    """Plans the training step of an experiment."""
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
