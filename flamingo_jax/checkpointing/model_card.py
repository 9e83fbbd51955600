"""Writes the model card of an export, README.md: front matter, what the model was trained on
and how, its figures, the licences of its parts and how to load it.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest

CARD = "README.md"
MOST_CARD_BYTES = 1 << 20
"""The most that is read of a part's own card."""
LOAD_FLAMINGO = """```python
import flamingo_jax as fj

model = fj.load("THIS_FOLDER"{parts})
print(model.generate([fj.Image("photo.jpg"), "Output:"]).text)
```

or `python -m launch.generate --model=THIS_FOLDER --prompt=prompt.json{flags}`.
"""
LOAD_PART = """```python
import flamingo_jax as fj

part = fj.load_{part}("THIS_FOLDER")
```

or as `config.{part}_from` of a training run.
"""
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying)(\.(txt|md))?", re.IGNORECASE)


class Part(NamedTuple):
    """A part that came from elsewhere. licence: as its folder's card or licence file says, ""
    where it says nothing. included: whether its weights are in the export.
    """

    name: str
    folder: str
    digest: str
    licence: str
    included: bool


class ModelCard(NamedTuple):
    """What a model card says.

    parameters: {part: how many}. training: {what: value}. data: the datasets, a row of columns
    each. figures: {name: value}. loading: Markdown on how to load the export.
    """

    title: str
    summary: str
    parameters: Mapping[str, int] = {}
    parts: Sequence[Part] = ()
    training: Mapping[str, str] = {}
    data: Sequence[Mapping[str, str]] = ()
    figures: Mapping[str, float] = {}
    loading: str = ""
    front_matter: Mapping[str, Any] = {}


def render(card: ModelCard) -> str:
    """Formats a card as Markdown with YAML front matter, as the hubs of models read it."""
    # JSON values are YAML.
    front = {"library_name": "flamingo_jax", "tags": ["flamingo", "jax"]} | dict(card.front_matter)
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {_cell(card.title)}", "", card.summary, ""]
    total = sum(card.parameters.values())
    if card.parameters:
        lines += ["## Parameters", ""]
        counts = [*card.parameters.items(), ("total", total)]
        lines += _table(("part", "parameters"), [(name, f"{count:,}") for name, count in counts])
    if card.training:
        lines += ["## Training", "", *_table(("", ""), list(card.training.items()))]
    if card.data:
        lines += ["### Data", ""]
        lines += _table(tuple(card.data[0]), [tuple(row.values()) for row in card.data])
    if card.figures:
        lines += ["## Figures", "", "At the exported step or before it, on held-out data:", ""]
        rows = [(name, f"{value:.4g}") for name, value in card.figures.items()]
        lines += _table(("metric", "value"), rows)
    if card.parts:
        lines += ["## Parts from elsewhere", ""]
        lines += _table(
            ("part", "from", "SHA-256 of its files", "licence", "in this folder"),
            [
                (
                    part.name,
                    f"`{part.folder}`",
                    f"`{part.digest}`" if part.digest else "",
                    part.licence or "not stated in its folder",
                    "yes" if part.included else "no: named by its digest",
                )
                for part in card.parts
            ],
        )
    if card.loading:
        lines += ["## Use", "", card.loading]
    return "\n".join(lines).rstrip() + "\n"


def describe_part(
    name: str, folder: str | pathlib.Path, digest: str = "", *, included: bool = True
) -> Part:
    """Describes a part with the licence that its folder states."""
    return Part(name.replace("_", " "), str(folder), digest, licence_of(folder), included)


def licence_of(folder: str | pathlib.Path) -> str:
    """Finds the licence that a model's folder states: in the front matter of its README.md, or
    else in the first line of its licence file; "" if there is neither.
    """
    folder = paths.as_path(folder)
    try:
        licence = _front_matter(_text(folder / CARD)).get("license", "")
        if licence:
            return licence
        for file in sorted(folder.iterdir(), key=str):
            if _LICENCE_FILE.fullmatch(file.name):
                lines = [line.strip(" #\t") for line in _text(file).splitlines()]
                first = next((line for line in lines if line), "")
                return f"{first[:100]} ({file.name})" if first else file.name
    except OSError:
        # The card says that the licence is not known; the export goes on.
        return ""
    return ""


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Adds up the values of parameters, {name: shape}."""
    return sum(math.prod(shape) for shape in shapes.values())


def _text(file: pathlib.Path) -> str:
    """Reads the beginning of a text file; "" where there is none."""
    try:
        size = manifest.retry_read(lambda: paths.version(file)).bytes
        if size > MOST_CARD_BYTES:
            return ""
        return manifest.retry_read(file.read_bytes).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


def _front_matter(text: str) -> dict[str, str]:
    """Reads the plain `key: value` lines between the first two lines of three dashes."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
        return {}
    end = [line.strip() for line in lines[1:]].index("---") + 1
    found = (re.fullmatch(r"(\w+):\s*(.+)", line) for line in lines[1:end])
    return {match[1]: match[2].strip(" \"'") for match in found if match}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in cells), ""]


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
