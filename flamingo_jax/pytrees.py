"""Parameters by flat name, {"language_model/layers/attention/query": array}, and the
conversion between stacked arrays and the per-layer names used on disk.

An attribute named `layers` always holds a stack: every array below it has a leading layer
axis. Unstacked, each layer's number follows that component of the name:
`language_model/layers/attention/query` [L, ...] becomes L arrays
`language_model/layers/12/attention/query`.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

STACK = "layers"
"""The component of a name below which arrays have a leading layer axis."""


def to_flat(tree: nnx.State | Mapping[Any, Any]) -> dict[str, Any]:
    """Flattens an nnx.State or a nested dict to {"a/b/c": raw array}, sorted by path; indices
    of lists become numbers. Works on tracers and ShapeDtypeStructs.

    Raises: ValueError for a name that contains "/".
    """
    nested = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return dict(_leaves(nested, ()))


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=lambda k: (isinstance(k, str), k)):
            if "/" in str(key):
                raise ValueError(
                    f"the name {key!r} below {'/'.join(path)!r} contains '/', which separates"
                    " the components of flat names"
                )
            yield from _leaves(tree[key], (*path, str(key)))
    else:
        yield "/".join(path), tree.get_value() if isinstance(tree, nnx.Variable) else tree


def from_flat(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """Nests flat names to the dict that `nnx.State(...)` and `nnx.replace_by_pure_dict` take:
    the inverse of `to_flat`.

    Components that are numbers become ints: as strings, NNX would sort a list's entries as 0,
    1, 10, 2 and mix them up silently.
    Raises: ValueError for a name that is both a value and the parent of another.
    """
    nested: dict[Any, Any] = {}
    for name, value in flat.items():
        components = name.split("/")
        for parent in itertools.accumulate(components[:-1], "{}/{}".format):
            if parent in flat:
                raise ValueError(
                    f"the name {parent!r} holds both a value and the subtree of {name!r}"
                )
        *parents, last = (int(part) if part.isdecimal() else part for part in components)
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def stack_axes(name: str) -> int:
    """Returns how many leading layer axes an array of this stacked name has."""
    return name.split("/").count(STACK)


def leaf_name(name: str, index: tuple[int, ...]) -> str:
    """Returns the per-layer name of a layer of a stack: ("a/layers/b", (12,)) ->
    "a/layers/12/b", the inverse of `stacked_name`.
    """
    numbers = iter(index)
    return "/".join(
        f"{part}/{next(numbers)}" if part == STACK else part for part in name.split("/")
    )


def stacked_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Splits a per-layer name into the stack's name and the layer's index in it:
    "a/layers/12/b" -> ("a/layers/b", (12,)).

    Raises: ValueError where no number follows "layers".
    """
    kept: list[str] = []
    index: list[int] = []
    for part in name.split("/"):
        if kept and kept[-1] == STACK and len(index) < kept.count(STACK):
            if not part.isdecimal():
                raise ValueError(f"{name!r}: a layer's number should follow {STACK!r}")
            index.append(int(part))
        else:
            kept.append(part)
    if len(index) < kept.count(STACK):
        raise ValueError(f"{name!r}: a layer's number should follow {STACK!r}")
    return "/".join(kept), tuple(index)
