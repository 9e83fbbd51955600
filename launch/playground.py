"""Opens a page in the browser to try an exported Flamingo on.

    python -m launch.playground --model=runs/quickstart/flamingo/export \
        [--examples=runs/quickstart/data/caption_one,runs/quickstart/data/vqa]

Put texts, images and clips in order, choose shots, and watch the answer arrive token by token.
A click on a token shows what it looked at: its cross-attention over the image's grid, which
image phi names, and what else could have been there. Needs Gradio: pip install -e
'.[playground]'.

Examples come from datasets of `launch.build_data` (FOLDER or FOLDER:SPLIT), or from a JSON or
JSONL file of prompts as `launch.generate` reads it. The page is served to this machine alone
unless --host says otherwise, asks no other machine for anything, and keeps uploads in a temporary
folder until they are read.
"""

import importlib.util
import logging
import pathlib
from typing import Any

from absl import flags

import flamingo_jax as fj
from launch import command, devices
from launch.prompt_files import define_frames, prompt_of, read_prompts

MODEL = flags.DEFINE_string("model", "", "Exported folder of a Flamingo.")
MESH = flags.DEFINE_string("mesh", "", devices.HELP)
EXAMPLES = flags.DEFINE_list(
    "examples", [], "Datasets, as FOLDER or FOLDER:SPLIT, and prompt files to show, by commas."
)
EXAMPLE_COUNT = flags.DEFINE_integer(
    "example_count", 24, "Examples to draw from each.", lower_bound=1, upper_bound=200
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of drawing examples.", lower_bound=0)
HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in."
)
PORT = flags.DEFINE_integer(
    "port", 7860, "Port to listen on; 0 for any that is free.", lower_bound=0, upper_bound=65535
)
MEGABYTES = flags.DEFINE_integer(
    "max_upload_megabytes", 32, "Largest file to upload.", lower_bound=1, upper_bound=1024
)
FPS, FRAMES = define_frames()


def main() -> int:
    if not MODEL.value:
        raise fj.UserError("--model is not set: see `python -m launch.playground --help`")
    if importlib.util.find_spec("gradio") is None:
        raise fj.UserError(
            "the playground needs Gradio, which is not installed: pip install -e '.[playground]'"
        )
    # Imported here, since they are slow to import and --help must be fast.
    from flamingo_jax.playground import server

    listening = server.listen(HOST.value, PORT.value)
    with server.private_folder() as folder:
        mesh = devices.open_mesh(MESH.value)
        if not devices.is_only_process():
            raise fj.UserError(
                "the playground answers from one process: start it on one host, whose devices"
                " --mesh may all use"
            )
        model = fj.load(MODEL.value, mesh=mesh)
        # Gradio reads its settings, which the folder has just set, when it is imported.
        from flamingo_jax.playground.page import make_page, theme
        from flamingo_jax.playground.playground import Playground, describe
        from flamingo_jax.playground.style import STYLE
        from flamingo_jax.playground.uploads import UploadLimits

        playground = Playground(
            model,
            _examples(model),
            folder,
            limits=UploadLimits(megabytes=MEGABYTES.value),
            fps=FPS.value,
            frames=FRAMES.value,
        )
        page = make_page(playground, _title(MODEL.value), describe(model))
        host, port = listening.getsockname()[:2]
        if host not in server.LOOPBACK:
            logging.warning("anyone who reaches %s:%d can use the model", host, port)
        print(f"open http://{host}:{port}", flush=True)
        server.serve(page, theme(), STYLE, listening, megabytes=MEGABYTES.value)
    return 0


def _title(folder: str) -> str:
    """Names a model by its folder; an export of a run by the run's."""
    path = pathlib.Path(folder).resolve()
    return path.parent.name if path.name == "export" else path.name


def _examples(model: "fj.Model") -> list[Any]:
    """Reads the examples of --examples.

    Raises: UserError for one that is neither a dataset nor a prompt file.
    """
    from data_pipelines.evaluation_data import PreparedDatasets
    from flamingo_jax.playground.examples import dataset_examples, prompt_examples

    found = []
    for name in EXAMPLES.value:
        path, count = pathlib.Path(name), EXAMPLE_COUNT.value
        if path.suffix in (".json", ".jsonl"):
            prompts = [
                prompt_of(parts, path.parent, fps=FPS.value, frames=FRAMES.value)
                for parts in read_prompts(path, "--examples")[:count]
            ]
            found += prompt_examples(prompts, model.config, count)
        else:
            found += dataset_examples(PreparedDatasets(), name, model.config, count, SEED.value)
    return found


if __name__ == "__main__":
    command.run(main)
