"""Prints the table of a run's parameters at its start: by part, trained or frozen, how many,
of which dtype, how sharded.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from flamingo_jax.training.setup import TrainSetup
from flamingo_jax.weight_parts import is_multiplied

LOG_WIDTH = 140


class PartSummary(NamedTuple):
    """One row of the table: a part's trained, or its frozen, parameters.

    part: the first component of their names, such as "resampler".
    bytes_per_device: of the parameters alone, without gradients and optimizer moments.
    largest: name of the largest array, whose shape and sharding are shown as an example.
    """

    part: str
    trained: bool
    arrays: int
    parameters: int
    dtype: str
    bytes_per_device: int
    largest: str
    shape: tuple[int, ...]
    sharding: str


def summarise(setup: TrainSetup) -> list[PartSummary]:
    """Summarises a run's parameters by part, sorted by name."""
    groups: dict[tuple[str, bool], dict[str, jax.ShapeDtypeStruct]] = {}
    for trained, parameters in ((False, setup.frozen), (True, setup.trainable)):
        for name, like in parameters.items():
            groups.setdefault((name.split("/")[0], trained), {})[name] = like
    return [_summary(part, trained, group) for (part, trained), group in sorted(groups.items())]


def _summary(
    part: str, trained: bool, parameters: Mapping[str, jax.ShapeDtypeStruct]
) -> PartSummary:
    """Makes the row of a part from its parameters' shapes and shardings."""
    largest = max(parameters, key=lambda name: math.prod(parameters[name].shape))
    like = parameters[largest]
    return PartSummary(
        part,
        trained,
        len(parameters),
        # The scales of int8 weights are no parameters of the model.
        sum(math.prod(p.shape) for name, p in parameters.items() if is_multiplied(name)),
        ", ".join(sorted({p.dtype.name for p in parameters.values()})),
        sum(
            math.prod(_sharding(p).shard_shape(p.shape)) * p.dtype.itemsize
            for p in parameters.values()
        ),
        largest,
        like.shape,
        _axes(like),
    )


def _sharding(like: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
    assert isinstance(like.sharding, jax.sharding.NamedSharding)
    return like.sharding


def _axes(like: jax.ShapeDtypeStruct) -> str:
    """Formats the mesh axes that each dimension is sharded over, as "-, fsdp, model"; "whole"
    if the array is replicated.
    """
    spec = [*_sharding(like).spec, *[None] * len(like.shape)][: len(like.shape)]
    names = [axis if isinstance(axis, str) else "+".join(axis or "-") for axis in spec]
    return "whole" if set(names) <= {"-"} else ", ".join(names)


def table(summaries: list[PartSummary]) -> Table:
    """Formats the summaries as a table, with totals."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("part", "", "arrays", "parameters", "MiB a device", "type"):
        numbers = heading in ("arrays", "parameters", "MiB a device")
        made.add_column(heading, justify="right" if numbers else "left", no_wrap=True)
    made.add_column("largest array, and the mesh axes it lies over", overflow="fold")
    for s in summaries:
        name = s.largest.removeprefix(f"{s.part}/")
        shape = " x ".join(map(str, s.shape)) or "scalar"
        made.add_row(*_sums(s.part, [s]), s.dtype, f"{name}: {shape}; {s.sharding}")
    made.add_section()
    for trained in (True, False):
        made.add_row(*_sums("all", [s for s in summaries if s.trained is trained]))
    return made


def _sums(title: str, summaries: list[PartSummary]) -> Iterator[str]:
    """Yields the cells of a row that can be summed over parts."""
    yield title
    yield "trained" if any(s.trained for s in summaries) else "frozen"
    yield f"{sum(s.arrays for s in summaries):,}"
    yield f"{sum(s.parameters for s in summaries):,}"
    yield f"{sum(s.bytes_per_device for s in summaries) / 2**20:,.1f}"


def show(setup: TrainSetup) -> None:
    """Prints the table to stderr, on the first process."""
    if jax.process_index() == 0:
        console = Console(stderr=True)
        # A log file has no terminal width; rich would fold the table to 80 columns.
        wide = console if console.is_terminal else Console(stderr=True, width=LOG_WIDTH)
        wide.print(table(summarise(setup)))
