"""Shows the parameters of a run at a glance: what is trained, how large it is, how it lies."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from flamingo_jax.training.setup import TrainSetup

LOG_WIDTH = 140


class PartSummary(NamedTuple):
    """Sums up a part's trained, or its frozen, parameters.

    part: the head of their names, such as "resampler". bytes_per_device: of the part alone,
      without gradient and moments. largest: name of its largest array, whose shape and sharding
      stand for the rest.
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
    """Sums a run's parameters up by part, in the order of their names."""
    groups: dict[tuple[str, bool], dict[str, jax.ShapeDtypeStruct]] = {}
    for trained, parameters in ((False, setup.frozen), (True, setup.trainable)):
        for name, like in parameters.items():
            groups.setdefault((name.split("/")[0], trained), {})[name] = like
    return [_summary(part, trained, group) for (part, trained), group in sorted(groups.items())]


def _summary(
    part: str, trained: bool, parameters: Mapping[str, jax.ShapeDtypeStruct]
) -> PartSummary:
    largest = max(parameters, key=lambda name: math.prod(parameters[name].shape))
    like = parameters[largest]
    return PartSummary(
        part,
        trained,
        len(parameters),
        sum(math.prod(p.shape) for p in parameters.values()),
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
    """Says over which mesh axes each dimension lies, as "-, fsdp, model"; "whole" for none."""
    spec = [*_sharding(like).spec, *[None] * len(like.shape)][: len(like.shape)]
    names = [axis if isinstance(axis, str) else "+".join(axis or "-") for axis in spec]
    return "whole" if set(names) <= {"-"} else ", ".join(names)


def table(summaries: list[PartSummary]) -> Table:
    """Lays summaries out for people, with totals."""
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
    yield title
    yield "trained" if any(s.trained for s in summaries) else "frozen"
    yield f"{sum(s.arrays for s in summaries):,}"
    yield f"{sum(s.parameters for s in summaries):,}"
    yield f"{sum(s.bytes_per_device for s in summaries) / 2**20:,.1f}"


def show(setup: TrainSetup) -> None:
    """Prints the table beside the progress bar, from the first process."""
    if jax.process_index() == 0:
        console = Console(stderr=True)
        # A file is as wide as its lines.
        wide = console if console.is_terminal else Console(stderr=True, width=LOG_WIDTH)
        wide.print(table(summarise(setup)))
