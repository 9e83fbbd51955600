"""Runs everything on a synthetic world: data, all stages, exports, evaluation, report.

    python -m launch.quickstart --workdir=runs/quickstart [--seed=0]

Every step is one of the ordinary commands in a process of its own. Finished steps are not run
again, so an interrupted quickstart continues where it stopped.
"""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

from absl import flags

from flamingo_jax.errors import UserError
from launch import command
from launch.resumable_commands import ResumableCommands, ShowLine, halves

WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "Folder for everything the quickstart makes."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of all stages.", lower_bound=0)

PRETRAINING_STAGES = ("contrastive", "language_model")
"""Stages that are independent of each other."""
STAGES = (*PRETRAINING_STAGES, "flamingo", "without_images")
LONGER = {"language_model": ("--config.training.steps=4500",)}
"""Arguments to continue a stage that ended above its required loss: the step at which a
language model learns to bind new words differs from seed to seed.
"""


def main() -> int:
    root = pathlib.Path(WORKDIR.value)
    _require_seed(root, SEED.value)
    root.mkdir(parents=True, exist_ok=True)
    commands = ResumableCommands(root / "seconds.json")
    signal.signal(signal.SIGTERM, lambda *_: commands.stop())
    commands.run("data", "-m", "launch.build_data", "quickstart", f"--output={root}/data")
    cores = halves()
    if len(cores) == 2 and not any(map(commands.is_done, PRETRAINING_STAGES)) and _on_cpu():
        # Steps this small do not use two cores, so both stages run at once, each on one half.
        lanes = [
            functools.partial(train_and_export, commands, root, name) for name in PRETRAINING_STAGES
        ]
        commands.side_by_side(lanes, cores)
    for name in STAGES:
        train_and_export(commands, root, name)
    commands.run(
        "evaluation",
        "-m",
        "launch.evaluate",
        "--suite=quickstart",
        "--shots=4",
        "--few_shot_limit=16",
        f"--data={root}/data",
        f"--model={root}/flamingo/export",
        f"--baseline={root}/without_images/export",
        f"--seconds={root}/seconds.json",
        f"--output={root}",
        *(f"--curves={name}={root}/{name}/metrics.jsonl" for name in PRETRAINING_STAGES),
    )
    print(
        f"\n{commands.total / 60:.1f} minutes in all; open {root}/report.html, metrics in"
        f" {root}/report.json",
        flush=True,
    )
    return 0


def train_and_export(
    commands: ResumableCommands, root: pathlib.Path, name: str, show: ShowLine | None = None
) -> None:
    """Trains a stage and exports it to ROOT/NAME/export, unless that has been done before."""
    commands.run(
        name,
        "-m",
        "launch.train",
        f"--config=configs/quickstart.py:{name},{root}",
        f"--config.seed={SEED.value}",
        f"--workdir={root}/{name}",
        again=LONGER.get(name, ()),
        show=show,
    )
    if not commands.is_done(f"export {name}"):
        # Left by a start that was killed between the export and the record of it.
        shutil.rmtree(root / name / "export", ignore_errors=True)
    commands.run(
        f"export {name}",
        "-m",
        "launch.export",
        f"--workdir={root}/{name}",
        f"--output={root}/{name}/export",
        show=show,
    )


def _require_seed(root: pathlib.Path, seed: int) -> None:
    """Raises a UserError if a finished stage was trained with another seed: its results would
    be reported as those of this seed.
    """
    for file in root.glob("*/config.json"):
        if (found := json.loads(file.read_text())["seed"]) != seed:
            raise UserError(
                f"{file.parent} was trained with --seed={found}, not {seed}: name another"
                " --workdir, or that seed"
            )


def _on_cpu() -> bool:
    """Returns whether JAX's default backend is the CPU. Another process finds out, since this
    one would keep an accelerator allocated.
    """
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return True
    asked = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"],
        capture_output=True,
        text=True,
    )
    return asked.stdout.strip() == "cpu"


if __name__ == "__main__":
    command.run(main)
