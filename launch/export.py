r"""Exports the parameters of a finished stage as one folder: sharded safetensors, config.json,
the tokenizer and a model card.

    python -m launch.export --workdir=runs/quickstart/flamingo --output=runs/quickstart/export \
        [--trained_only]

It takes the newest complete checkpoint of the workdir, and names newer ones that are
incomplete; it changes nothing in the workdir. Frozen parts are copied from the folders they
came from, so the export is self-contained. With --trained_only it holds what was trained and
the tokenizer, and names the folders of the frozen parts with their digests: a small folder to
share with people who have these parts. fj.load and launch.generate read both kinds.

Parameters are read and written a piece at a time: memory holds the largest one at most, and the
optimizer's moments are not read. A killed export is continued by the same command; the folder
appears when it is complete.
"""

from absl import flags

from flamingo_jax.errors import UserError
from flamingo_jax.paths import as_path
from launch import command

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the training run.")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write; must not be there yet.")
TRAINED_ONLY = flags.DEFINE_bool(
    "trained_only",
    False,
    "Leave out the frozen parts, and name their folders and digests instead.",
)


def main() -> int:
    for name, value in (("workdir", WORKDIR.value), ("output", OUTPUT.value)):
        if not value:
            raise UserError(f"--{name} is not set: name a folder")
    from flamingo_jax.training.exporting import export_run

    workdir, output = as_path(WORKDIR.value), as_path(OUTPUT.value)
    export_run(workdir, output, trained_only=TRAINED_ONLY.value)
    return 0


if __name__ == "__main__":
    command.run(main)
