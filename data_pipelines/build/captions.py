"""Caption files: JSON lines, each with the name of a file below the folder and its captions."""

import json
import os
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


def caption_file(folder: pathlib.Path, name: str | None, usual: Sequence[str], key: str) -> pathlib.Path:
    """The caption file of that name, or the first usual one; its lines have names under `key`. Raises UserError where there is none."""
    for candidate in [name] if name else usual:
        if (folder / candidate).is_file():
            return folder / candidate
    raise UserError(
        f"{folder} has no {name or ' or '.join(usual)}: write one line of JSON per file, such as "
        f'{{"{key}": "path/below/the/folder", "captions": ["a cat"]}}, or name the file with --captions'
    )


def read_captions(file: pathlib.Path, key: str, root: pathlib.Path) -> tuple[dict[str, list[str]], int]:
    """Captions by file name, relative to the folder `root`, in the order of the lines, and how many lines are of no use.

    A line has the name under `key` and `captions` (a list) or `caption`; lines about the same file are joined.
    """
    captions: dict[str, list[str]] = {}
    bad = 0
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                said = record["captions"] if "captions" in record else record["caption"]
                said = [said] if isinstance(said, str) else said
                "".join(said).encode()  # JSON can hold half of a character, which no dataset can.
                name = _relative(record[key], root)
            except (ValueError, KeyError, TypeError):
                bad += 1
                continue
            if not isinstance(said, list):
                bad += 1
                continue
            captions.setdefault(name, []).extend(text.strip() for text in said if text.strip())
    return captions, bad


def why_not(root: pathlib.Path, path: pathlib.Path) -> str | None:
    """OUTSIDE or MISSING where there is no such file in the folder, links followed; None where there is."""
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return OUTSIDE
        return None if path.is_file() else MISSING
    except (OSError, ValueError, RuntimeError):  # A name that no file can have: too long, not in Unicode, links in a circle.
        return MISSING


def _relative(name: str, root: pathlib.Path) -> str:
    """The one way of writing a file's name, so that all lines about a file are found together."""
    if os.path.isabs(name):
        name = os.path.relpath(os.path.realpath(name), os.path.realpath(root))
    return os.path.normpath(name)
