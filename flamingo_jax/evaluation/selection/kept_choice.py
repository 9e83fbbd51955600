"""Keeps which shots were chosen in a JSON file beside the results, so that a resumed or
repeated run has the same ones, and anyone can read which they were.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flamingo_jax import paths
from flamingo_jax.checkpointing.manifest import write_atomically
from flamingo_jax.errors import UserError
from flamingo_jax.storage import LASTING, read_with_retries

Orders = list[list[int]]
"""Places of support examples, in order of choice: a row for each query, or one for all."""
FORMAT = 1
MOST_BYTES = 256 << 20


def keep_choice(
    folder: pathlib.Path,
    name: str,
    about: Mapping[str, int | str],
    ids: Sequence[str],
    most: int,
    choose: Callable[[], Orders],
) -> Orders:
    """Returns the kept choice, or chooses and keeps it.

    The file is <name>.<selection>.<key>.json with {"format", "about", "orders", "ids": {place:
    id}}, where the key is a digest of `about`.

    Args:
      about: what the choice depends on, among it "selection".
      ids: those of the support examples.
      most: how many are needed for each query; a file with fewer is replaced.

    Raises: UserError where the file is damaged or its ids are others.
    """
    key = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
    plain = re.sub(r"[^\w.-]", "_", name) or "benchmark"
    file = folder / f"{plain}.{about['selection']}.{key}.json"
    if file.is_file():
        orders = _read(file, dict(about), ids)
        if all(len(order) >= most for order in orders):
            return orders
    orders = choose()
    used = sorted({place for order in orders for place in order})
    document = {
        "format": FORMAT,
        "about": dict(about),
        "ids": {str(place): ids[place] for place in used},
        "orders": orders,
    }
    paths.make_folder(folder)
    write_atomically(file, json.dumps(document).encode())
    return orders


def _read(file: pathlib.Path, about: dict[str, Any], ids: Sequence[str]) -> Orders:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        document = json.loads(read_with_retries(file.read_bytes, file, LASTING))
        if document["format"] != FORMAT or document["about"] != about:
            raise ValueError("it is of another version or another choice")
        for place, told in document["ids"].items():
            if ids[int(place)] != told:
                raise ValueError(
                    f"support example {place} was {told!r}, and is {ids[int(place)]!r}"
                )
        orders = [[int(place) for place in order] for order in document["orders"]]
        allowed = {int(place) for place in document["ids"]}
        if not all(allowed.issuperset(order) and min(order, default=0) >= 0 for order in orders):
            raise ValueError("it names places without an id")
        return orders
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        raise UserError(
            f"{file}, which keeps the chosen shots, cannot be used ({error}): remove it, and they"
            " are chosen again"
        ) from error
