"""Goes the whole path on the embedded synthetic world: data, stages, exports, evaluation, report.

    python -m launch.quickstart --workdir=runs/quickstart [--seed=0]

Each command is an ordinary one, run as its own process; one that is finished is not
run again, so that an interrupted quickstart goes on where it stopped.
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
"""Stages that need nothing of each other."""
STAGES = (*PRETRAINING_STAGES, "flamingo", "without_images")
LONGER = {"language_model": ("--config.training.steps=4500",)}
"""How a stage goes on that ended above its required loss: when a language model learns to bind
new words differs from seed to seed.
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
        # Steps this small do not keep two cores busy.
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
    """Trains a stage and exports it to ROOT/NAME/export, each unless that was done before."""
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
        # What a start left that was killed between the export and the note of it.
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
    """A UserError where a stage that is there was trained from another seed: what is finished
    would be told as this one's.
    """
    for file in root.glob("*/config.json"):
        if (found := json.loads(file.read_text())["seed"]) != seed:
            raise UserError(
                f"{file.parent} was trained with --seed={found}, not {seed}: name another"
                " --workdir, or that seed"
            )


def _on_cpu() -> bool:
    """Whether JAX runs on the CPU here; asked of another process, since an accelerator would be
    held by this one.
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
