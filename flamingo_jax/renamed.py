"""Config fields that have been renamed, moved or removed.

An old name in a user's config or flag is an error, whose sentence gives the new name. In
documents on disk (config.json of runs and exports, a checkpoint's description) old names are
read as the new ones, so that everything once trained can still be loaded.

To rename a field, add a row to `MOVED` under the dataclass that had it; to remove one, add a
row to `REMOVED` that says what to do instead.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Moved(NamedTuple):
    """The new place of a field.

    to: its new name, from the dataclass that had it on; dotted if it is in a nested config.
    convert: computes the new value from the old one.
    was: the type of old values, for a name that is still in use for a nested config: values of
      other types are not old.
    """

    to: str
    convert: Callable[[Any], Any] | None = None
    was: type | None = None


MOVED: dict[str, dict[str, Moved]] = {
    "DatasetConfig": {"length": Moved("max_length")},
    "FlamingoConfig": {
        "every": Moved("conditioning.xattn_every"),
        "xattn_heads": Moved("conditioning.heads"),
        "xattn_head_width": Moved("conditioning.head_width"),
        "xattn_feed_forward": Moved("conditioning.feed_forward"),
        "gate_start": Moved("conditioning.gate_init"),
        "gated_out_scale": Moved("conditioning.out_scale"),
        "attend": Moved("conditioning.attend_to_media"),
    },
    "Checkpoint": {"bases": Moved("pretrained")},
    "TrainingConfig": {"mixing": Moved("round_robin", lambda form: form == "round_robin")},
    "OptimizerConfig": {
        "peak_rate": Moved("learning_rate"),
        "end_rate": Moved("end_learning_rate"),
        "decay": Moved("schedule"),
        "decay_at": Moved("boundaries"),
        "decay_factor": Moved("boundary_factor"),
        "no_decay": Moved("weight_decay_exclude"),
        "decay_vectors": Moved("weight_decay_on_vectors"),
    },
    "LanguageModelConfig": {
        "heads": Moved("attention.heads"),
        "kv_heads": Moved("attention.kv_heads"),
        "head_width": Moved("attention.head_width"),
        "attention_bias": Moved("attention.bias"),
        "attention_window": Moved("attention.window"),
        "query_key_norm": Moved("attention.query_key_norm", lambda on: "head" if on else "none"),
        "feed_forward": Moved("feed_forward.width", was=int),
        "activation": Moved("feed_forward.activation"),
        "gated_feed_forward": Moved("feed_forward.gated"),
        "positions": Moved("positions.kind", was=str),
        "position_bias": Moved("positions.bias_init"),
        "rope_base": Moved("positions.base"),
        "rope_scaling": Moved("positions.scaling"),
        "norm_eps": Moved("norm.eps"),
    },
}
"""{dataclass: {old field: its new place}}; "Checkpoint" is the dict of `Checkpoints.extra`."""

REMOVED: dict[str, dict[str, str]] = {}
"""{dataclass: {old field: what to do instead, as the end of a sentence}}."""


def old_name_error(dataclass: str, key: str, value: Any, name: str) -> str | None:
    """Returns the error sentence for field `key` of a dataclass; None where it is no old name.

    name: the dataclass's place in the config, such as "config.optimizer".
    """
    moved = MOVED.get(dataclass, {}).get(key)
    if moved is not None and (moved.was is None or isinstance(value, moved.was)):
        return f"{name}.{key} is {name}.{moved.to} now: use that name"
    if key in REMOVED.get(dataclass, {}):
        return f"{name}.{key} is no more: {REMOVED[dataclass][key]}"
    return None


def with_new_names(dataclass: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored mapping of a dataclass with old fields moved to their new places.

    If a field is also there under its new name, that value is kept.
    """
    moves, gone = MOVED.get(dataclass, {}), REMOVED.get(dataclass, {})
    found: dict[str, Any] = {}
    old: list[tuple[Moved, Any]] = []
    for key, value in document.items():
        moved = moves.get(key)
        if moved is not None and (moved.was is None or isinstance(value, moved.was)):
            old.append((moved, value))
        elif key not in gone:
            found[key] = copy.deepcopy(value)
    # After all current fields, so that these win.
    for moved, value in old:
        *groups, field = moved.to.split(".")
        place = found
        for group in groups:
            place = place.setdefault(group, {})
        place.setdefault(field, value if moved.convert is None else moved.convert(value))
    return found
