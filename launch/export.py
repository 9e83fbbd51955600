"""Writes the parameters of a finished stage as one folder: sharded safetensors, config.json and the tokenizer.

    python -m launch.export --workdir=runs/quickstart/flamingo --output=runs/quickstart/export

The newest whole checkpoint in the workdir is taken; frozen parts are read from the exports they came from, so that the folder stands alone.
"""

import json
import logging
import pathlib

import jax
from absl import flags

from flamingo_jax import configuring, errors
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.processing.tokenizer import FILE_NAME, tokenizer_file
from flamingo_jax.tasks import stages
from flamingo_jax.training.assembly import assemble, load_frozen, require_same_bases
from launch import command

log = logging.getLogger("launch")

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the training run.")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write; must not be there yet.")


def main() -> int:
    for name, value in (("workdir", WORKDIR.value), ("output", OUTPUT.value)):
        if not value:
            raise errors.UserError(f"--{name} is not set: name a folder")
    workdir, output = pathlib.Path(WORKDIR.value), pathlib.Path(OUTPUT.value)
    if not (workdir / "config.json").exists():
        raise errors.UserError(f"--workdir={workdir} holds no config.json: name the folder of a training run")
    experiment = configuring.from_json(Experiment, json.loads((workdir / "config.json").read_text()))
    # Its own mesh, not the run's: a checkpoint is read by any number of devices.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        assembly = assemble(experiment, mesh)
        checkpoints = Checkpoints(workdir / "checkpoints", keep_last=experiment.training.keep_last, keep_every=experiment.training.keep_every)
        step = checkpoints.latest()
        if step is None:
            raise errors.UserError(f"{workdir} has no whole checkpoint: train first")
        state = checkpoints.restore(step, assembly.state)
        frozen, origins = load_frozen(experiment, assembly)
        require_same_bases(checkpoints.extra(step)["bases"], origins, workdir)
    export_model(
        output,
        kind=stages.MODEL_FIELD[experiment.task],
        config=configuring.to_json(stages.model_config(experiment)),
        parameters=state.trainable | frozen,
        tokenizer_file=tokenizer_file(workdir) or workdir / FILE_NAME,
        extra_files={"metrics.jsonl": workdir / "metrics.jsonl", "experiment.json": workdir / "config.json"},
    )
    log.info("exported step %d of %s to %s", step, workdir, output)
    return 0


if __name__ == "__main__":
    command.run(main)
