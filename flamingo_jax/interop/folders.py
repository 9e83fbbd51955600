"""Opens and checks the folder of a published model: translates its config, and locates every
parameter in its files.
"""

import dataclasses
import difflib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.stored_tensors import (
    DTYPES,
    StoredTensor,
    Term,
    layout,
    read_headers,
)
from flamingo_jax.checkpointing.streaming import HashingReader, StreamedTensor
from flamingo_jax.checkpointing.tensor_streams import stream_tensors
from flamingo_jax.checkpointing.tensors import read_sharded
from flamingo_jax.checkpointing.verification import file_digests
from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.interop import content, families
from flamingo_jax.interop.documents import CONFIG, Document
from flamingo_jax.interop.families.family import Family, ModelPart
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.vision import vision_encoder
from flamingo_jax.processing.tokenizer import tokenizer_file
from flamingo_jax.pytrees import STACK, to_flat

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
"""In transformers 5 this file has the preprocessor's options, under image_processor."""


@dataclasses.dataclass(frozen=True)
class PublishedFolder:
    """Reads the parameters of a published folder, whose tensors have been checked for presence
    and shape. Arrays stay on disk until they are read.
    """

    folder: pathlib.Path
    part: ModelPart
    config: Any
    """LanguageModelConfig or VisionConfig."""
    tokenizer_file: pathlib.Path | None
    shapes: dict[str, tuple[int, ...]]
    """{Flat stacked name: shape} of all parameters."""
    _sources: dict[str, tuple[Term, ...]] = dataclasses.field(repr=False)
    _stored: dict[str, StoredTensor] = dataclasses.field(repr=False)

    def digest(self, process_group: ProcessGroup | None = None) -> str:
        """Computes the SHA-256 over the digests of config.json and all safetensors files.
        Every file is read, once per run. process_group: the processes of the run; by default a
        `SingleProcess`.
        """
        try:
            return manifest.digest_of(file_digests(self.folder, self._names(), process_group))
        except OSError as error:
            raise manifest.unreadable(self.folder, error) from error

    @property
    def largest(self) -> int:
        """Size in bytes of the largest tensor."""
        return max(
            self._stored[term.name].bytes for terms in self._sources.values() for term in terms
        )

    @property
    def files(self) -> list[pathlib.Path]:
        """The safetensors files, sorted."""
        return sorted({tensor.file for tensor in self._stored.values()})

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Returns {flat stacked name: dtype on disk}, taken from the first layer."""
        found: dict[str, np.dtype] = {}
        for name in self.shapes:
            terms = self._sources[_leaf(name, 0)]
            found[name] = np.dtype(DTYPES[self._stored[terms[0].name].dtype])
        return found

    def read(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        process_group: ProcessGroup | None = None,
        layers: range | None = None,
    ) -> dict[str, jax.Array]:
        """Reads the parameters named in `targets` ({flat stacked name: shape, dtype,
        sharding}). `tensors.read_sharded` describes how several processes share the reading.

        layers: only these layers of the stacks in `targets`; by default all.

        Raises: UserError when a file cannot be read.
        """
        title = "" if layers else f"reading {self.folder.name}"
        return read_sharded(self._stored, self._sources, targets, title, process_group, layers)

    def stream(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> list[StreamedTensor]:
        """Describes the parameters in `targets` for reading one layer at a time, cast to the
        targets' dtypes, in the order of the files.
        """
        return stream_tensors(self._stored, self._sources, targets)

    def check(self, reader: HashingReader) -> str:
        """Returns the same as `digest`, from what `reader` has read, and reads the rest."""
        try:
            names = self._names()
            return manifest.digest_of({name: reader.digest(self.folder / name) for name in names})
        except OSError as error:
            raise manifest.unreadable(self.folder, error) from error

    def stamp(self) -> str:
        """Returns what identifies the content of the files without reading them, as long as
        they are not moved.
        """
        try:
            versions = [paths.version(self.folder / name) for name in self._names()]
        except OSError as error:
            raise manifest.unreadable(self.folder, error) from error
        return f"{self.folder.absolute()} {[list(version) for version in versions]}"

    def _names(self) -> list[str]:
        """Lists the files that determine the weights, relative to the folder."""
        files = {self.folder / CONFIG, *(tensor.file for tensor in self._stored.values())}
        return sorted(file.relative_to(self.folder).as_posix() for file in files)


def is_published_folder(folder: str | pathlib.Path) -> bool:
    """Returns whether a folder's config.json is one of transformers rather than of an export
    of this project.
    """
    try:
        config = json.loads((paths.as_path(folder) / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config and "format" not in config


def open_folder(folder: str | pathlib.Path, part: ModelPart) -> PublishedFolder:
    """Opens the folder of a published model. Reads headers only and allocates nothing.

    Raises: UserError for a config that is not supported, and one that lists all tensors that
      are missing, unexpected, of the wrong shape or of an unknown dtype.
    """
    folder = paths.as_path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: name one with a model's config.json and safetensors"
        )
    family, config = _parse(folder, part)
    stored = read_headers(_files(folder))
    unread: tuple[str, ...] = (*family.unread, *family.also_unread(config))
    if isinstance(config, LanguageModelConfig):
        config = content.with_own_head(config, family, stored)
        # A tied head may be stored as well; `with_own_head` has checked that it is the
        # embedding.
        unread += (re.escape(family.head),) if config.tied_embeddings else ()
        model: Any = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    else:
        model = nnx.eval_shape(lambda: vision_encoder(config, rngs=nnx.Rngs(0)))
    shapes = {name: value.shape for name, value in to_flat(nnx.state(model)).items()}
    sources, wanted = _expand(family.table(config), shapes)
    # A model that was saved without its head has names without the prefix: add it.
    if not any(name.startswith(family.prefix) for name in stored):
        stored = {
            name if name == family.head else family.prefix + name: tensor
            for name, tensor in stored.items()
        }
    said = content.differing(config, stored) if part == "language_model" else []
    _check(folder, wanted, stored, unread, said)
    return PublishedFolder(folder, part, config, tokenizer_file(folder), shapes, sources, stored)


def read_config(folder: str | pathlib.Path, part: ModelPart) -> Any:
    """Reads the config alone, as LanguageModelConfig or VisionConfig; tensors may be missing.

    Raises: UserError for a setting that the models here do not support.
    """
    folder = paths.as_path(folder)
    family, config = _parse(folder, part)
    if isinstance(config, LanguageModelConfig) and config.tied_embeddings:
        stored = read_headers(_files(folder)) if any(folder.glob("*.safetensors")) else {}
        return content.with_own_head(config, family, stored)
    return config


def _parse(folder: pathlib.Path, part: ModelPart) -> tuple[Family, Any]:
    """Reads config.json and, for an encoder, the options of its preprocessor."""
    config = Document.read(folder / CONFIG)
    preprocessor = Document(folder / PREPROCESSOR, {})
    if part == "vision_encoder" and (folder / PREPROCESSOR).is_file():
        preprocessor = Document.read(folder / PREPROCESSOR)
    elif part == "vision_encoder" and (folder / PROCESSOR).is_file():
        preprocessor = Document.read(folder / PROCESSOR).inside("image_processor")
    family = families.family_of(config, part)
    return family, family.parse(config, preprocessor)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if (folder / INDEX).is_file():
        names = Document.read(folder / INDEX).inside("weight_map")
        files = sorted({str(names.given(name)) for name in names})
        for name in files:
            # The index must not refer to files outside of the folder.
            if pathlib.PurePath(name).name != name:
                raise UserError(
                    f"{folder / INDEX} names the file {name!r}, which does not lie beside it:"
                    " copy the model again"
                )
        return [folder / name for name in files]
    files_here = (
        [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    )
    if len(files_here) == 1:
        return files_here
    if files_here:
        raise UserError(
            f"{folder} holds {len(files_here)} safetensors files but no {INDEX}: copy it as well"
        )
    why = (
        "; files that unpickle are not read: save it with transformers' safe_serialization"
        if any(folder.glob("*.bin"))
        else ""
    )
    raise UserError(
        f"{folder} holds no safetensors files{why}"
        if why
        else f"{folder} holds no safetensors files: copy the model again"
    )


def _leaf(name: str, layer: int) -> str:
    return name.replace(f"{STACK}/", f"{STACK}/{layer}/", 1)


def _expand(
    table: Mapping[str, Sequence[Term]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Term, ...]], dict[str, tuple[int, ...]]]:
    """Expands a table over the layers of a model with parameters of these shapes.

    Returns: ({per-layer name: terms}, {tensor name: shape that it must have}).
    """
    sources: dict[str, tuple[Term, ...]] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        stacked = STACK in name.split("/")
        one = shape[1:] if stacked else shape
        for layer in range(shape[0] if stacked else 1):
            sources[_leaf(name, layer)] = tuple(
                term._replace(name=term.name.replace("{}", str(layer))) for term in table[name]
            )
        for term in table[name]:
            # The shape of the tensor that the term needs. With `taken`, another term of the
            # same tensor determines its number of rows.
            found = layout(term, one).stored
            if term.taken is None:
                full = (found[0] + term.first, *found[1:]) if term.first else found
                wanted |= {
                    term.name.replace("{}", str(layer)): full
                    for layer in range(shape[0] if stacked else 1)
                }
    return sources, wanted


def _check(
    folder: pathlib.Path,
    wanted: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, StoredTensor],
    unread: Sequence[str],
    said: Sequence[str],
) -> None:
    """Raises a UserError that lists every difference between the files and the config. said:
    differences that were found in the content of tensors.
    """
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in unread))
    missing = [name for name in wanted if name not in stored]
    surplus = [name for name in stored if name not in wanted and not ignored.fullmatch(name)]
    problems = [*said, *(f"{name} is missing{_nearest(name, surplus)}" for name in missing)]
    problems += [
        f"{name} {list(stored[name].shape)} is not known{_nearest(name, missing)}"
        for name in surplus
    ]
    for name, shape in wanted.items():
        if name in stored and stored[name].shape != shape:
            problems.append(f"{name} is {list(stored[name].shape)} instead of {list(shape)}")
        if name in stored and stored[name].dtype not in DTYPES:
            problems.append(f"{name} is of type {stored[name].dtype}, not {', '.join(DTYPES)}")
    if problems:
        raise UserError(
            f"{folder} does not hold the tensors of its {CONFIG} ({len(problems)} differ):"
            f" {'; '.join(problems)}"
        )


def _nearest(name: str, others: Sequence[str]) -> str:
    """Returns " (nearest: NAME)" for the most similar of the other names, or "". Only names
    with the same numbers are compared, since comparing a hundred layers would take minutes.
    """
    numbers = re.findall(r"\d+", name)
    close = difflib.get_close_matches(
        name, [other for other in others if re.findall(r"\d+", other) == numbers], n=1
    )
    return f" (nearest: {close[0]})" if close else ""
