"""The whole path on the embedded world: data, the three stages, export, evaluation, report.

    python -m launch.quickstart --workdir=runs/quickstart [--seed=0]

Each part is one of the ordinary commands, run as its own process; a part that is finished is not done again, so that an interrupted
quickstart goes on where it stopped.
"""

import json
import pathlib
import subprocess
import sys
import time

from absl import flags

from flamingo_jax import errors
from launch import command

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder for everything the quickstart makes.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of all stages.")

STAGES = ("contrastive", "language_model", "flamingo", "without_pictures")
LONGER = {"language_model": ("--config.training.steps=4500",)}
"""How a stage goes on that ended above its required loss: when a language model learns to bind new words differs from seed to seed."""


def main() -> int:
    root = pathlib.Path(WORKDIR.value)
    root.mkdir(parents=True, exist_ok=True)
    seconds_file = root / "seconds.json"
    seconds: dict[str, float] = json.loads(seconds_file.read_text()) if seconds_file.exists() else {}

    def part(name: str, *arguments: str, again: tuple[str, ...] = ()) -> None:
        """Runs a command that is not done yet; `again` are what to add where it has not learned what the next ones stand on."""
        if name in seconds:
            return
        print(f"== {name}", flush=True)
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *arguments]).returncode
        if code == errors.EXIT_NOT_LEARNED and again:
            print(f"== {name}, longer: {' '.join(again)}", flush=True)
            code = subprocess.run([sys.executable, "-m", *arguments, *again]).returncode
        if code != 0:
            raise errors.UserError(f"the quickstart stopped in {name!r} (exit code {code}); run it again to go on from there")
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began
        seconds_file.write_text(json.dumps(seconds, indent=2))

    part("data", "launch.build_data", "--source=quickstart", f"--output={root}/data")
    for stage in STAGES:
        config = [
            f"--config=configs/quickstart.py:{stage},{root}",
            f"--config.seed={SEED.value}",
            f"--workdir={root}/{stage}",
        ]
        part(stage, "launch.train", *config, again=LONGER.get(stage, ()))
        part(f"export {stage}", "launch.export", f"--workdir={root}/{stage}", f"--output={root}/{stage}/export")
    part(
        "evaluation", "launch.evaluate", "--suite=quickstart", "--shots=4,32", "--few_shot_limit=16", f"--data={root}/data",
        f"--model={root}/flamingo/export", f"--baseline={root}/without_pictures/export", f"--seconds={seconds_file}", f"--output={root}",
        *(f"--curves={stage}={root}/{stage}/metrics.jsonl" for stage in STAGES if stage != "flamingo"),
    )
    print(f"\n{sum(seconds.values()) / 60:.1f} minutes in all; open {root}/report.html, figures in {root}/report.json", flush=True)
    return 0


if __name__ == "__main__":
    command.run(main)
