"""The parameters of a run at a glance: what is trained, how large it is and how it lies."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from flamingo_jax.training.setup import TrainSetup


class PartSummary(NamedTuple):
    """A part's trained, or its frozen, parameters.

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
    made = Table(title="parameters", title_justify="left")
    for heading in ("part", "", "arrays", "parameters", "type", "MiB a device"):
        made.add_column(heading, justify="right" if heading in NUMBERS else "left")
    for heading in ("largest", "shape", "over the mesh"):
        made.add_column(heading, overflow="fold")
    for row in _rows(summaries):
        made.add_row(*row)
    made.add_section()
    for trained in (True, False):
        chosen = [summary for summary in summaries if summary.trained is trained]
        made.add_row(
            "all",
            _TRAINED[trained],
            f"{sum(s.arrays for s in chosen):,}",
            f"{sum(s.parameters for s in chosen):,}",
            "",
            f"{sum(s.bytes_per_device for s in chosen) / 2**20:,.1f}",
        )
    return made


NUMBERS = ("arrays", "parameters", "MiB a device")
_TRAINED = {True: "trained", False: "frozen"}


def _rows(summaries: list[PartSummary]) -> Iterator[tuple[str, ...]]:
    for s in summaries:
        yield (
            s.part,
            _TRAINED[s.trained],
            f"{s.arrays:,}",
            f"{s.parameters:,}",
            s.dtype,
            f"{s.bytes_per_device / 2**20:,.1f}",
            s.largest,
            " x ".join(map(str, s.shape)) or "scalar",
            s.sharding,
        )


def show(setup: TrainSetup) -> None:
    """Prints the table beside the progress bar, from the first process."""
    if jax.process_index() == 0:
        Console(stderr=True).print(table(summarise(setup)))
