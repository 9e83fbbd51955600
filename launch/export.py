"""Exports the parameters of a finished stage as one folder: sharded safetensors, config.json
and the tokenizer.

    python -m launch.export --workdir=runs/quickstart/flamingo --output=runs/quickstart/export

It takes the newest complete checkpoint of the workdir, and names newer ones that are
incomplete; it changes nothing in the workdir. Frozen parts are copied from the exports they
came from, so the folder is self-contained.
"""

from absl import flags

from flamingo_jax.errors import UserError
from flamingo_jax.paths import as_path
from launch import command

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the training run.")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write; must not be there yet.")


def main() -> int:
    for name, value in (("workdir", WORKDIR.value), ("output", OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is not set: name a folder")
    from flamingo_jax.training.trained_run import export_run

    export_run(as_path(WORKDIR.value), as_path(OUTPUT.value))
    return 0


if __name__ == "__main__":
    command.run(main)
