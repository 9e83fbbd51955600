"""Writes the parameters of a finished stage as one folder: sharded safetensors, config.json and
the tokenizer.

    python -m launch.export --workdir=runs/quickstart/flamingo --output=runs/quickstart/export

The newest whole checkpoint in the workdir is taken, and newer ones that are not whole are
named; nothing in the workdir is changed. Frozen parts are read from the exports they came from,
so that the folder stands alone.
"""

import json
import logging
import pathlib
from collections.abc import Mapping

import jax
from absl import flags

from flamingo_jax import configuring, errors
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.processing.tokenizer import FILE_NAME, tokenizer_file
from flamingo_jax.tasks import stages
from flamingo_jax.training.pretrained import load_frozen, require_same_pretrained
from flamingo_jax.training.setup import make_setup
from launch import command

log = logging.getLogger("launch")

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the training run.")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write; must not be there yet.")


def main() -> int:
    for name, value in (("workdir", WORKDIR.value), ("output", OUTPUT.value)):
        if not value:
            raise errors.UserError(f"--{name} is not set: name a folder")
    workdir, output = pathlib.Path(WORKDIR.value), pathlib.Path(OUTPUT.value)
    try:
        text = manifest.retry_read((workdir / "config.json").read_text)
    except (FileNotFoundError, NotADirectoryError):
        lacks = f"--workdir={workdir} holds no config.json"
        raise errors.UserError(f"{lacks}: name the folder of a training run") from None
    except OSError as error:
        raise manifest.unreadable(workdir, error) from error
    experiment = configuring.from_json(Experiment, json.loads(text))
    # Its own mesh, not the run's: a checkpoint is read by any number of devices.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        setup = make_setup(experiment, mesh)
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep_last=experiment.training.keep_last,
            keep_every=experiment.training.keep_every,
        )
        step, passed = checkpoints.newest()
        if step is None:
            raise errors.UserError(f"{workdir} has no whole checkpoint{_told(passed)}: train first")
        log.info("taking step %d of %d%s", step, experiment.training.steps, _told(passed))
        state = checkpoints.restore(step, setup.state)
        frozen, digests = load_frozen(experiment, setup.frozen)
        require_same_pretrained(checkpoints.extra(step)["pretrained"], digests, workdir)
    export_model(
        output,
        kind=stages.MODEL_FIELD[experiment.task],
        config=configuring.to_json(stages.model_config(experiment)),
        parameters=state.trainable | frozen,
        tokenizer_file=tokenizer_file(workdir) or workdir / FILE_NAME,
        extra_files={
            "metrics.jsonl": workdir / "metrics.jsonl",
            "experiment.json": workdir / "config.json",
        },
    )
    log.info("exported step %d of %s to %s%s", step, workdir, output, _told(passed))
    return 0


def _told(passed: Mapping[int, str]) -> str:
    """What is newer than the step that is taken, and why it is not."""
    return "".join(f"; not step {step}: {why}" for step, why in sorted(passed.items()))


if __name__ == "__main__":
    command.run(main)
