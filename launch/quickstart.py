"""The whole path on the embedded world: data, the three stages, export, evaluation, report.

    python -m launch.quickstart --workdir=runs/quickstart [--seed=0]

Each part is one of the ordinary commands, run as its own process; a part that is finished is
not done again, so that an interrupted quickstart goes on where it stopped.
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
from launch.parts import Parts, Show, halves

WORKDIR = flags.DEFINE_string(
    "workdir", "runs/quickstart", "Folder for everything the quickstart makes."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of all stages.", lower_bound=0)

BASES = ("contrastive", "language_model")
"""Stages that need nothing of each other."""
STAGES = (*BASES, "flamingo", "without_images")
LONGER = {"language_model": ("--config.training.steps=4500",)}
"""How a stage goes on that ended above its required loss: when a language model learns to bind
new words differs from seed to seed.
"""


def main() -> int:
    root = pathlib.Path(WORKDIR.value)
    _require_seed(root, SEED.value)
    root.mkdir(parents=True, exist_ok=True)
    parts = Parts(root / "seconds.json")
    signal.signal(signal.SIGTERM, lambda *_: parts.stop())

    def stage(name: str, show: Show | None = None) -> None:
        """Trains and exports a stage."""
        config = [
            f"--config=configs/quickstart.py:{name},{root}",
            f"--config.seed={SEED.value}",
            f"--workdir={root}/{name}",
        ]
        parts.run(name, "-m", "launch.train", *config, again=LONGER.get(name, ()), show=show)
        if not parts.is_done(f"export {name}"):
            # What a start left that was killed between the export and the note of it.
            shutil.rmtree(root / name / "export", ignore_errors=True)
        parts.run(
            f"export {name}",
            "-m",
            "launch.export",
            f"--workdir={root}/{name}",
            f"--output={root}/{name}/export",
            show=show,
        )

    parts.run("data", "-m", "launch.build_data", "--source=quickstart", f"--output={root}/data")
    cores = halves()
    if len(cores) == 2 and not any(map(parts.is_done, BASES)) and _on_cpu():
        # Steps this small do not keep two cores busy.
        parts.side_by_side([functools.partial(stage, name) for name in BASES], cores)
    for name in STAGES:
        stage(name)
    parts.run(
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
        *(f"--curves={name}={root}/{name}/metrics.jsonl" for name in STAGES if name != "flamingo"),
    )
    print(
        f"\n{parts.total / 60:.1f} minutes in all; open {root}/report.html, figures in"
        f" {root}/report.json",
        flush=True,
    )
    return 0


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
