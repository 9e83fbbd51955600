"""Caption files: JSON lines, each with the name of a file below the folder and its captions."""

import json
import pathlib
from collections.abc import Sequence

from flamingo_jax.errors import UserError

BAD_LINE = "caption line that is not JSON with a name and captions"
MISSING = "missing"
NO_CAPTION = "no caption"
OUTSIDE = "outside the folder"


def existing_folder(folder: str | pathlib.Path) -> pathlib.Path:
    """Raises UserError where the folder is not there."""
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}: mend --input")
    return path


def caption_file(folder: pathlib.Path, name: str | None, usual: Sequence[str]) -> pathlib.Path:
    """The caption file of that name, or the first usual one. Raises UserError where there is none."""
    for candidate in [name] if name else usual:
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"{folder} has no {name or ' or '.join(usual)}: write one line of JSON per file, such as "
        '{"image": "cats/1.jpg", "captions": ["a cat"]}, or name the file with --captions'
    )


def read_captions(file: pathlib.Path, key: str) -> tuple[dict[str, list[str]], int]:
    """Captions by file name in the order of the lines, and how many lines are of no use.

    A line has the name under `key` and `captions` (a list) or `caption`; lines about the same file are joined.
    """
    captions: dict[str, list[str]] = {}
    bad = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                said = record["captions"] if "captions" in record else record["caption"]
                name = record[key]
            except (ValueError, KeyError, TypeError):
                bad += 1
                continue
            said = [said] if isinstance(said, str) else said
            if not isinstance(name, str) or not isinstance(said, list) or not all(isinstance(text, str) for text in said):
                bad += 1
                continue
            captions.setdefault(name, []).extend(text.strip() for text in said if text.strip())
    return captions, bad


def inside(root: pathlib.Path, path: pathlib.Path) -> bool:
    """Whether a path, links followed, lies in the folder."""
    return path.resolve().is_relative_to(root.resolve())
