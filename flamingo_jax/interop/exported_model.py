"""An opened export with the frozen parts that it names but does not contain, and the low-rank
updates that it holds of them, as one model.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flamingo_jax.checkpointing.export import Export
from flamingo_jax.checkpointing.streaming import HashingReader, StreamedTensor, whole
from flamingo_jax.distributed.process_group import ProcessGroup
from flamingo_jax.errors import UserError
from flamingo_jax.models.weights import INPUT_AXES, merge_lora
from flamingo_jax.weight_parts import is_update

if TYPE_CHECKING:  # It opens these models.
    from flamingo_jax.interop.weight_sources import WeightSource

Parameters = dict[str, jax.Array]
_merge = jax.jit(merge_lora, static_argnames=("scale", "inputs"))


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """An opened export together with the frozen parts that it names by folder and digest,
    whose low-rank updates it may hold: the complete model, as if all of it was in the export.
    """

    export: Export
    parts: "Mapping[str, tuple[str, WeightSource]]"
    """{part that is not in the export: (prefix of its parameters' names, its weights)}"""

    @property
    def tokenizer_file(self) -> pathlib.Path | None:
        """The tokenizer of the export."""
        return self.export.tokenizer_file

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{Flat stacked name: shape} of all parameters."""
        return {n: shape for n, (shape, _) in self._kinds.items() if not is_update(n)}

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        """{Flat stacked name: dtype}: on disk, or that of training for other folders' parts."""
        return {n: dtype for n, (_, dtype) in self._kinds.items() if not is_update(n)}

    @functools.cached_property
    def _kinds(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for part, (prefix, source) in self.parts.items():
            dtype, dtypes = self.export.parts[part].dtype, source.dtypes
            for name, shape in source.shapes.items():
                found[prefix + name] = shape, np.dtype(dtype or dtypes[name])
        dtypes = self.export.dtypes
        # What was trained, and what was changed on the way, takes the place of a part's own.
        return found | {n: (shape, dtypes[n]) for n, shape in self.export.shapes.items()}

    def read(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        process_group: ProcessGroup | None = None,
        layers: range | None = None,
    ) -> Parameters:
        """Verifies the files and reads parameters; low-rank updates are merged. See
        `WeightSource.read`.
        """
        # The parts of a stack are read one after the other: all bytes are verified with the
        # first.
        first = layers is None or not layers.start
        if first:
            self.export.verify(process_group)
        own = set(self.export.names)
        updates = {name: target for name, target in targets.items() if f"{name}/lora_up" in own}
        factors = {
            f"{name}/{factor}": self._replicated(f"{name}/{factor}", target, layers)
            for name, target in updates.items()
            for factor in ("lora_down", "lora_up")
        }
        found = self.export.read_sharded(
            {name: target for name, target in targets.items() if name in own} | factors,
            process_group,
            layers,
        )
        for part, (prefix, source) in self.parts.items():
            wanted = {
                name.removeprefix(prefix): target
                for name, target in targets.items()
                if name not in own and name.startswith(prefix)
            }
            if wanted:
                if first:
                    require_digest(self.export, part, source.digest(process_group))
                read = source.read(wanted, process_group, layers)
                found |= {prefix + name: value for name, value in read.items()}
        for name in updates:
            down, up = (found.pop(f"{name}/{factor}") for factor in ("lora_down", "lora_up"))
            merge = jax.jit(
                merge_lora,
                static_argnames=("scale", "inputs"),
                out_shardings=targets[name].sharding,
            )
            found[name] = merge(found[name], down, up, scale=self.scale, inputs=_inputs(name))
        return found

    def stream(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> list[StreamedTensor]:
        """Describes parameters for reading one layer at a time; see `WeightSource.stream`."""
        own = set(self.export.names)
        updates = {f"{name}/{f}" for name in targets for f in ("lora_down", "lora_up")} & own
        factors = {
            name: jax.ShapeDtypeStruct(self.export.shapes[name], jnp.float32) for name in updates
        }
        found = self.export.stream(
            {name: target for name, target in targets.items() if name in own} | factors
        )
        for prefix, source in self.parts.values():
            wanted = {
                name.removeprefix(prefix): target
                for name, target in targets.items()
                if name not in own and name.startswith(prefix)
            }
            found += [t._replace(name=prefix + t.name) for t in source.stream(wanted)]
        return merge_updates(found, self.scale)

    def check(self, reader: HashingReader) -> str:
        """Verifies the files that `reader` has read; returns the export's digest."""
        for part, (_, source) in self.parts.items():
            require_digest(self.export, part, source.check(reader))
        return self.export.check(reader)

    @property
    def scale(self) -> float:
        """The factor of low-rank updates."""
        lora = self.export.lora
        return lora["alpha"] / lora["rank"] if lora.get("rank") else 1.0

    def _replicated(
        self, name: str, like: jax.ShapeDtypeStruct, layers: range | None
    ) -> jax.ShapeDtypeStruct:
        """Declares a factor of an update on all devices of the matrix that it updates."""
        sharding = like.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        shape = self.export.shapes[name]
        shape = shape if layers is None else (len(layers), *shape[1:])
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def require_digest(export: Export, part: str, digest: str) -> None:
    """Raises UserError where the weights found for a part are not those that the export was
    trained with.
    """
    wanted = export.parts[part].digest
    if digest != wanted:
        raise UserError(
            f"{export.folder} was trained on another {part.replace('_', ' ')} (digest {wanted})"
            f" than is found now ({digest}): name the folder of the right one, as"
            f" --parts={part}=FOLDER or parts={{{part!r}: FOLDER}}"
        )


def merge_updates(tensors: Sequence[StreamedTensor], scale: float) -> list[StreamedTensor]:
    """Replaces the factors of low-rank updates, and the matrices they update, by their sums:
    NAME, NAME/lora_down and NAME/lora_up become NAME, float32 sums in the matrix's dtype.
    """
    named = {tensor.name: tensor for tensor in tensors}
    found: list[StreamedTensor] = []
    for tensor in tensors:
        down, up = (named.get(f"{tensor.name}/{factor}") for factor in ("lora_down", "lora_up"))
        if is_update(tensor.name):
            continue
        if down is not None and up is not None:

            def pieces(
                reader: HashingReader, of: tuple[StreamedTensor, ...] = (tensor, down, up)
            ) -> Iterator[np.ndarray]:
                arrays = [jnp.asarray(whole(one, reader)) for one in of]
                yield np.asarray(_merge(*arrays, scale=scale, inputs=_inputs(of[0].name)))

            # The matrix, its copy on the device, the sum in float32, and the result.
            held = 3 * tensor.bytes + 4 * math.prod(tensor.shape)
            tensor = tensor._replace(pieces=pieces, held=held)
        found.append(tensor)
    return found


def _inputs(name: str) -> int:
    """Returns how many axes of a matrix are inputs."""
    return INPUT_AXES["/".join(name.split("/")[-2:])]
