"""Reads prompt files, for `launch.generate` and `launch.playground`: a JSON list of parts, or
one such list per line.
"""

import json
import pathlib
from typing import Any

from absl import flags

import flamingo_jax as fj
from data_pipelines.build.text_files import decode

# The flags that are defined here are of the command that asks for them, in its --help too.
flags.disclaim_key_flags()

EXAMPLE = '[{"image": "a.png"}, {"text": "Output:"}]'


def define_frames() -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Defines the flags `--fps` and `--frames`, how a prompt's videos are read."""
    fps = flags.DEFINE_float(
        "fps",
        1.0,
        "Frames a second that are read from videos (paper: 1 in training).",
        lower_bound=1e-3,
    )
    frames = flags.DEFINE_integer(
        "frames",
        None,
        "Frames of a video at most, from its middle; by default as many as the model was trained"
        " with (paper: 30 with --fps=3).",
        lower_bound=1,
    )
    return fps, frames


def read_prompts(path: pathlib.Path, flag: str) -> list[list[Any]]:
    """Reads the prompts of a JSON or JSONL file, each a list of parts.

    flag: which names the file, for errors.

    Raises: UserError where it cannot be read, or is no such file.
    """
    try:
        text = decode(path.read_bytes())
        text.encode()
    except (OSError, UnicodeError) as error:
        raise fj.UserError(f"{flag}={path} cannot be read as text: {error}") from error
    try:
        try:
            prompts = [json.loads(text)]
        except json.JSONDecodeError:
            prompts = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise fj.UserError(
            f"{path} is neither JSON nor JSONL ({error}): write a list of parts such as {EXAMPLE}"
        ) from error
    if not prompts:
        raise fj.UserError(f"{path} holds no prompt: write a list of parts such as {EXAMPLE}")
    for prompt in prompts:
        if not isinstance(prompt, list) or not prompt:
            raise fj.UserError(
                f"{path}: a prompt is {json.dumps(prompt)[:80]}, but must be a list of parts"
            )
    return prompts


def prompt_of(
    parts: list[Any], folder: pathlib.Path, *, fps: float, frames: int | None
) -> list[Any]:
    """Turns the parts of a prompt file into texts, `fj.Image`s and `fj.Video`s.

    folder: which paths are relative to. fps, frames: how videos are sampled, see `fj.Video`.

    Raises: UserError for a malformed part, or a file that cannot be read.
    """
    # Imported here, since the tokenizer libraries are slow to import and --help must be fast.
    from flamingo_jax.inference.prompts import fill_image_tags

    prompt: list[Any] = []
    for part in parts:
        kind, value = (
            next(iter(part.items())) if isinstance(part, dict) and len(part) == 1 else (None, None)
        )
        if kind not in ("text", "image", "video") or not isinstance(value, str):
            raise fj.UserError(
                f'a part of a prompt is {json.dumps(part)[:80]}, but must be {{"text": ...}},'
                ' {"image": path} or {"video": path}'
            )
        if kind == "text":
            prompt.append(value)
        elif kind == "image":
            prompt.append(fj.Image(folder / value))
        else:
            prompt.append(fj.Video(folder / value, fps=fps, frames=frames))
    return fill_image_tags(prompt)
