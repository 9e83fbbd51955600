"""Computes and compares fingerprints: the config, code, versions and data on which all
processes of a run must agree before any of them starts.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable, Mapping
from typing import Any

from flamingo_jax import paths
from flamingo_jax.configuring import flatten, to_json
from flamingo_jax.dataset_identity import NOTHING, identify
from flamingo_jax.experiment import Experiment

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SOURCES = ("flamingo_jax", "configs", "data_pipelines", "launch")
ROOT = pathlib.Path(__file__).parents[2]
SMALL = (".json", ".model")
"""Suffixes of files that are compared by content: configs and tokenizers."""


def run_fingerprint(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Computes the fingerprint of this process, {kind: {name: value}}, small and JSON-able.

    Datasets are compared by their identities, other folders by the sizes of their files and
    the
    content of the small ones: hashing weights on every host would take too long here.
    """
    datasets = [*experiment.data.values(), *experiment.held_out.values()]
    splits = {(dataset.path, dataset.split) for dataset in datasets}
    folders = {
        experiment.vision_encoder_from,
        experiment.language_model_from,
        experiment.flamingo_from,
        experiment.tokenizer,
    } - {"", "random"}
    versions = {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }
    return {
        "config": flatten(to_json(experiment), "config") | {"--workdir": str(workdir)},
        "version": versions,
        "code": {
            str(path.relative_to(ROOT)): _digest(path.read_bytes())
            for folder in SOURCES
            for path in sorted((ROOT / folder).rglob("*.py"))
        },
        "data": {
            **{
                f"{path} ({split})": _readable(_split, path, split)
                for path, split in sorted(splits)
            },
            **{folder: _readable(_folder, folder) for folder in sorted(folders)},
        },
    }


def first_difference(fingerprint: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a sentence about the first difference between two processes, or "" if all agree.

    fingerprint: {name of the process: its fingerprint}.
    """
    (first, expected), *others = fingerprint.items()
    for name, found in others:
        for kind, sentence in _SENTENCES.items():
            a, b = expected[kind], found[kind]
            for key in [*a, *(key for key in b if key not in a)]:
                if a.get(key, NOTHING) != b.get(key, NOTHING):
                    return sentence.format(
                        key=key,
                        first=first,
                        other=name,
                        a=a.get(key, NOTHING),
                        b=b.get(key, NOTHING),
                    )
    return ""


_SENTENCES = {
    "version": "{other} has {key} {b}, but {first} has {a}: install the same on all hosts",
    "code": "{other} has another {key} than {first}: put the same code on all hosts",
    "config": (
        "{other} has {key} = {b!r}, but {first} has {a!r}: start all processes with the same"
        " command"
    ),
    "data": (
        "{other} finds something else at {key} ({b}) than {first} ({a}): put the same data on"
        " all hosts"
    ),
}


def _readable(describe: Callable[..., str], *place: str) -> str:
    """Describes the data at a path; if it cannot be read, the description differs from
    others.
    """
    try:
        return describe(*place)
    except OSError as error:
        return f"what cannot be read: {error.strerror or error}"


def _split(path: str, split: str) -> str:
    found = identify(path, split)
    return NOTHING if found is None else str(found)


def _folder(folder: str) -> str:
    """Describes the files of an export, a published model or a tokenizer, with a short
    digest.
    """
    path = paths.as_path(folder)
    if path.is_file():
        return f"{paths.version(path).bytes} bytes, {_digest(path.read_bytes())}"
    files = [file for file in sorted(path.glob("*")) if file.suffix in (*SMALL, ".safetensors")]
    if not files:
        return NOTHING
    described = [
        (
            file.name,
            paths.version(file).bytes,
            _digest(file.read_bytes()) if file.suffix in SMALL else "",
        )
        for file in files
    ]
    return f"{len(files)} files, {_digest(json.dumps(described).encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
