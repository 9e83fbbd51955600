"""What all processes of a run must agree on before any of them starts: config, code, versions and the data they read."""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

from flamingo_jax.configuring import to_json
from flamingo_jax.experiment import Experiment

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SOURCES = ("flamingo_jax", "configs", "data_pipelines", "launch")
ROOT = pathlib.Path(__file__).parents[2]
_ABSENT = "nothing"


def gather(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """{kind: {name: value}}, small and JSON-able. Data are known by the sizes of their files and the content of the small ones that describe them."""
    folders = {dataset.path for part in (experiment.data, experiment.held_out) for dataset in part.values()}
    folders |= {experiment.vision_encoder_from, experiment.language_model_from, experiment.flamingo_from, experiment.tokenizer} - {"", "random"}
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "config": {f"config.{key}": value for key, value in _leaves(to_json(experiment), "")} | {"--workdir": str(workdir)},
        "version": versions,
        "code": {str(path.relative_to(ROOT)): _digest(path.read_bytes()) for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))},
        "data": {folder: _folder(pathlib.Path(folder)) for folder in sorted(folders)},
    }


def first_difference(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on the first thing that two processes disagree on, or "". facts: those of every process, by its name."""
    (first, expected), *others = facts.items()
    for name, found in others:
        for kind, sentence in _SENTENCES.items():
            a, b = expected[kind], found[kind]
            for key in [*a, *(key for key in b if key not in a)]:
                if a.get(key, _ABSENT) != b.get(key, _ABSENT):
                    return sentence.format(key=key, first=first, other=name, a=a.get(key, _ABSENT), b=b.get(key, _ABSENT))
    return ""


_SENTENCES = {
    "version": "{other} has {key} {b}, but {first} has {a}: install the same on all hosts",
    "code": "{other} has another {key} than {first}: put the same code on all hosts",
    "config": "{other} has {key} = {b!r}, but {first} has {a!r}: start all processes with the same command",
    "data": "{other} finds something else at {key} ({b}) than {first} ({a}): put the same data on all hosts",
}


def _leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, tree)]


def _folder(path: pathlib.Path) -> str:
    """Its files in a few words that differ where the files do."""
    if path.is_file():
        return f"{path.stat().st_size} bytes, {_digest(path.read_bytes())}"
    # Runs put files of their own beside a dataset's.
    files = [file for file in sorted(path.glob("*")) if file.suffix in (".json", ".model", ".safetensors") or "record-" in file.name]
    if not files:
        return _ABSENT
    described = [(file.name, file.stat().st_size, _digest(file.read_bytes()) if file.suffix == ".json" else "") for file in files]
    return f"{len(files)} files, {_digest(json.dumps(described).encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
