r"""Fine-tunes a Flamingo to one task with a grid of hyper-parameters, chooses the best cell by
its score on the validation split, and scores it on the test split once (paper 3.2, B.2.2).

    python -m launch.fine_tune --config=configs/fine_tune.py:vqav2 --model=EXPORT \
        --data=data/vqav2 --grid=learning_rate=1e-6,1e-5 --grid=steps=1000,3000 \
        --grid=augmentation=0,0.2 --image_size=480 --output=runs/vqav2

A grid varies steps, learning_rate, batch_size, augmentation (strength of colour jitter, with
flips where it is above 0), image_size, unfreeze_encoder, or any key of the config such as
optimizer.weight_decay. With other steps the schedule keeps its form: warmup and boundaries are
scaled. config.fine_tuning says how the task is scored.

OUTPUT/results.json and results.md hold each cell's held-out loss, its score with the 95 %
interval and its seconds; OUTPUT/best is the export of the best cell, OUTPUT/cells/NAME the
workdir of each. Cells are trained one after the other, on all devices of one host. SIGTERM saves
and exits with code 75; the same command goes on from there, and with more values in the grid
trains only the new cells.
"""

import dataclasses
import functools
import signal
import sys
import time

from absl import flags

from flamingo_jax import errors
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.folder_lock import lock_folder
from flamingo_jax.paths import as_path, compilation_cache, is_bucket, make_folder
from launch import command, devices

MODEL = flags.DEFINE_string(
    "model",
    "",
    "Exported Flamingo to go on from, whose model and tokenizer replace the config's; by default"
    " config.flamingo_from.",
)
DATA = flags.DEFINE_string(
    "data", "", "Folder of the task's dataset; by default the path in the config."
)
GRID = flags.DEFINE_multi_string(
    "grid", [], "KEY=VALUE,... of a hyper-parameter; without any, the config is the only cell."
)
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size",
    None,
    "Side of the images (paper: 480); by default the model's own. Positions are interpolated.",
    lower_bound=1,
)
UNFREEZE_ENCODER = flags.DEFINE_boolean(
    "unfreeze_encoder",
    None,
    "Train the vision encoder too, as the paper does; by default as the config says.",
)
OUTPUT = flags.DEFINE_string("output", "", "Folder for the cells, the results and the export.")
MESH = flags.DEFINE_string(
    "mesh", "", f"Scoring (training has config.mesh). {devices.HELP.partition(' Several')[0]}"
)
CONFIG = command.define_config()


def main() -> int:
    experiment = command.experiment(CONFIG)
    if not OUTPUT.value:
        raise UserError("--output is not set: name a folder for the cells and the results")
    output = as_path(OUTPUT.value)
    if is_bucket(output) or (output.exists() and not output.is_dir()):
        raise UserError(f"--output={output} is no folder of a disk: name one")
    experiment = _adapted(experiment)
    # Imported here, since --help and bad input must not wait for jax.
    from flamingo_jax.fine_tuning.grid import cells, parse_grid

    grid = cells(parse_grid(GRID.value, experiment), experiment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(errors.EXIT_PREEMPTED))
    import jax

    from data_pipelines.evaluation_data import PreparedDatasets
    from flamingo_jax.fine_tuning.checks import check_cells
    from flamingo_jax.fine_tuning.scoring import score_split
    from flamingo_jax.fine_tuning.search import Search
    from flamingo_jax.partitioning.mesh import make_mesh
    from launch.training import run

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache(output)))
    datasets, mesh = PreparedDatasets(), devices.open_mesh(MESH.value)
    check_cells(grid, datasets, make_mesh(experiment.mesh))
    make_folder(output)
    with lock_folder(output, "a grid search"):
        code, table = Search(
            output,
            grid,
            experiment.fine_tuning.metric,
            train=lambda cell, folder: run(cell, folder, began=time.monotonic()),
            score=functools.partial(score_split, datasets=datasets, mesh=mesh),
        ).run()
    command.print_table(table)
    print(f"wrote {output}/results.json and {output}/results.md", flush=True)
    return code


def _adapted(experiment: Experiment) -> Experiment:
    """Returns the experiment with what the flags say of model, data, image size and encoder."""
    from flamingo_jax.fine_tuning.checks import of_dataset, of_model

    if MODEL.value:
        overridden = [name for name in command.given_flags() if name.startswith("config.flamingo.")]
        if overridden:
            raise UserError(
                f"--{overridden[0]} was given, but config.flamingo comes from --model: leave it"
                " out, or use --image_size"
            )
        experiment = of_model(experiment, MODEL.value)
    if DATA.value:
        experiment = of_dataset(experiment, DATA.value)
    if IMAGE_SIZE.value and experiment.flamingo:
        vision = dataclasses.replace(experiment.flamingo.vision, image_size=IMAGE_SIZE.value)
        flamingo = dataclasses.replace(experiment.flamingo, vision=vision)
        experiment = dataclasses.replace(experiment, flamingo=flamingo)
    if UNFREEZE_ENCODER.value is not None:
        training = dataclasses.replace(
            experiment.training, unfreeze_vision_encoder=UNFREEZE_ENCODER.value
        )
        experiment = dataclasses.replace(experiment, training=training)
    return experiment


if __name__ == "__main__":
    command.run(main)
