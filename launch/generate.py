r"""Continues prompts of texts, images and videos with an exported Flamingo.

    python -m launch.generate --model=runs/quickstart/flamingo/export --prompt=prompt.json \
        [--beam_size=3 [--n_best=3] | --temperature=0.7 --top_p=0.9] [--stop=TEXT] [--stream] \
        [--mesh=data=2,model=4]

The prompt file is a JSON list of parts in any order, {"text": "Output:"}, {"image":
"photo.jpg"} or {"video": "clip.mp4"}, or one such list per line (JSONL) for several prompts.
Paths are relative to the file.

Write a prompt as the training text was written. The quickstart's captions read `<image>Output:
a caption`, so a captioning prompt is [{"image": "photo.jpg"}, {"text": "Output:"}]. For a
model whose captions follow their images directly (configs/own_data.py) it is [{"image":
"photo.jpg"}]. A text may mark the places of visuals with <image>; a tag that is meant as text
needs a backslash before it.
"""

import pathlib
from typing import Any

from absl import flags

import flamingo_jax as fj
from launch import command, devices
from launch.prompt_files import define_frames, prompt_of, read_prompts

MODEL = flags.DEFINE_string("model", "", "Exported folder of a Flamingo.")
PROMPT = flags.DEFINE_string("prompt", "", "JSON or JSONL file of prompts.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 32, "Tokens to write at most.", lower_bound=1)
BEAM = flags.DEFINE_integer(
    "beam_size",
    3,
    "Hypotheses of beam search; 1 is greedy, or samples with a temperature.",
    lower_bound=1,
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Samples at this temperature where it is not 0.", lower_bound=0.0
)
TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Nucleus sampling: only the likeliest tokens that together have this probability.",
    lower_bound=0.0,
    upper_bound=1.0,
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.", lower_bound=0)
STOP = flags.DEFINE_multi_string(
    "stop", [], "Ends an answer before this text; may be given several times."
)
N_BEST = flags.DEFINE_integer(
    "n_best",
    1,
    "Answers of beam search for each prompt, the best first, each in a line after its"
    " log-probability; an empty line follows a prompt's answers.",
    lower_bound=1,
)
STREAM = flags.DEFINE_bool(
    "stream", False, "Write the answers token by token as they come; greedy, or sampled."
)
FPS, FRAMES = define_frames()
MESH = flags.DEFINE_string("mesh", "", devices.HELP)
FROZEN_DTYPE = flags.DEFINE_enum("frozen_dtype", None, devices.FROZEN_DTYPES, devices.DTYPE_HELP)
PARTS = command.define_parts()


def main() -> int:
    for name, value in (("model", MODEL.value), ("prompt", PROMPT.value)):
        if not value:
            raise fj.UserError(f"--{name} is not set: see `python -m launch.generate --help`")
    if TOP_P.value == 0.0:
        raise fj.UserError(
            "--top_p is 0, which allows no token: use a number above 0, or --temperature=0 for"
            " the likeliest token"
        )
    if STREAM.value and (N_BEST.value > 1 or (BEAM.present and BEAM.value > 1)):
        raise fj.UserError(
            "--stream writes every token as it comes, but beam search knows its answer only at"
            " the end: leave out --stream, or --beam_size and --n_best"
        )
    file = pathlib.Path(PROMPT.value)
    prompts = [
        prompt_of(parts, file.parent, fps=FPS.value, frames=FRAMES.value)
        for parts in read_prompts(file, "--prompt")
    ]
    mesh = devices.open_mesh(MESH.value)
    devices.keep_compiled_programs()
    model = fj.load(
        MODEL.value, mesh=mesh, frozen_dtype=FROZEN_DTYPE.value, parts=command.parts(PARTS)
    )
    sampling: dict[str, Any] = {
        "max_tokens": MAX_TOKENS.value,
        "temperature": TEMPERATURE.value,
        "top_p": TOP_P.value,
        "stop": STOP.value,
        "seed": SEED.value,
    }
    if STREAM.value:
        for prompt in prompts:
            for token in model.stream(prompt, **sampling):
                print(token.text, end="", flush=True)
            print(flush=True)
        return 0
    completions = model.generate(
        prompts,
        beam_size=1 if TEMPERATURE.value > 0 else BEAM.value,
        n_best=N_BEST.value,
        **sampling,
    )
    if devices.is_first_process():
        for completion in completions:
            print(shown(completion, N_BEST.value), flush=True)
    return 0


def shown(completion: "fj.Completion", n_best: int) -> str:
    """Returns what is printed of a prompt's answers: the text, or for several each in a line
    after its log-probability, and an empty line.
    """
    if n_best == 1:
        return completion.text
    answers = [completion, *completion.alternatives]
    return "".join(f"{answer.score:.3f}\t{answer.text}\n" for answer in answers)


if __name__ == "__main__":
    command.run(main)
