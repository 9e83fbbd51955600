"""How fast training is on the devices that are here.

    python -m launch.benchmark train --config=configs/flamingo_3b.py:h200_1 [--steps=10] [--json] [--trace=FOLDER]
    python -m launch.benchmark train --sizes=layers=4,width=256,heads=4,vocab=8192,every=1,vit_layers=4,vit_width=256,vit_heads=4,\\
image=96,patch=16,interleaved=8x3x128,pairs=16x1x32

`train` runs the real update on random weights and full rows of random content, and prints tokens and images a second, the time of each part
and the model FLOPs utilisation, measured against a large matrix product on the same devices in the same run. `--sizes` makes a Flamingo that
a PyTorch peer can be built with as well: a language model of the GPT-NeoX form (rotary positions, GELU, a head of its own), a ViT, a
resampler of 6 layers, cross-attention of 8 heads of 64; `interleaved` and `pairs` are rows x pictures x tokens.
"""

import dataclasses
import json

from absl import flags
from rich.console import Console
from rich.table import Table

from configs.benchmark import experiment_of
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.planning.timing import Timing, time_step
from launch import command

SIZES = flags.DEFINE_string("sizes", "", "Sizes of a model and its batches in place of a config, NAME=VALUE separated by commas.")
STEPS = flags.DEFINE_integer("steps", 10, "Steps that are timed.", lower_bound=1)
TRACE = flags.DEFINE_string("trace", "", "Folder for a profiler trace of three steps, for TensorBoard or Perfetto.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
CONFIG = command.define_config()


def main(verb: str) -> int:
    assert verb == "train"
    if SIZES.value and CONFIG.value is not None:
        raise UserError("--sizes and --config both describe a model: give one of them")
    experiment = experiment_of(SIZES.value) if SIZES.value else command.experiment(CONFIG)
    if experiment.task == "contrastive":
        raise UserError("this config trains the contrastive stage, which the benchmark has no batches for: choose a Flamingo's or a language model's")
    experiment = dataclasses.replace(experiment, vision_encoder_from="random", language_model_from="random")
    timing = time_step(experiment, steps=STEPS.value, trace=TRACE.value)
    if JSON.value:
        print(json.dumps(timing._asdict() | {"mfu": timing.mfu}))
    else:
        Console().print(_table(experiment, timing))
    return 0


def _table(experiment: Experiment, timing: Timing) -> Table:
    table = Table("", title=f"{experiment.name or experiment.task}: one training step")
    table.add_column("", justify="right")
    table.add_row("whole step", f"{timing.step:.4g} s")
    for part, seconds in timing.parts.items():
        table.add_row(f"  {part}", f"{seconds:.4g} s")
    table.add_section()
    table.add_row("tokens a second", f"{timing.tokens / timing.step:,.0f}")
    if timing.frames:
        table.add_row("images a second", f"{timing.frames / timing.step:,.1f}")
    table.add_row("model FLOPs of a step", f"{timing.flops:.4g}")
    table.add_row("measured matrix rate", f"{timing.matrix_rate / 1e9:,.0f} GFLOP/s")
    table.add_row("model FLOPs utilisation of it", f"{timing.mfu:.1%}")
    table.add_row("compiled in", f"{timing.compile_seconds:.0f} s")
    return table


if __name__ == "__main__":
    command.run(main, verbs=("train",))
