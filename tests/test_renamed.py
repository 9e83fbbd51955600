"""Old names of config fields: told to users, read from documents."""

import dataclasses

import pytest

from flamingo_jax import renamed
from flamingo_jax.configuring import from_config, from_json, key_type
from flamingo_jax.errors import UserError
from flamingo_jax.renamed import Moved


@dataclasses.dataclass(frozen=True)
class Positions:
    kind: str = "rotary"
    base: float = 10.0


@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 1
    positions: Positions = Positions()


@dataclasses.dataclass(frozen=True)
class Run:
    model: Model = Model()


@pytest.fixture(autouse=True)
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {
        "size": Moved("width", convert=lambda n: 2 * n),
        "rope_base": Moved("positions.base"),
        "positions": Moved("positions.kind", was=str),
    }
    monkeypatch.setitem(renamed.MOVED, "Model", moved)
    monkeypatch.setitem(renamed.REMOVED, "Model", {"depth": "count the layers"})


def test_a_document_is_read_with_the_names_it_was_written_with() -> None:
    old = {"model": {"size": 3, "rope_base": 5.0, "positions": "alibi", "depth": 7}}
    assert from_json(Run, old) == Run(Model(6, Positions("alibi", 5.0)))
    now = {"model": {"width": 3, "positions": {"kind": "alibi"}, "rope_base": 2.0}}
    assert from_json(Run, now) == Run(Model(3, Positions("alibi", 2.0)))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("size", 3, "config.model.size is config.model.width now: use that name"),
        ("positions", "alibi", "config.model.positions is config.model.positions.kind now"),
        ("depth", 3, "config.model.depth is no more: count the layers"),
    ],
)
def test_a_config_with_an_old_name_is_told_the_new_one(
    field: str, value: object, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        from_config(Run, {"model": {field: value}})


def test_a_flag_with_an_old_name_is_told_the_new_one() -> None:
    with pytest.raises(UserError, match=r"config.model.size is config.model.width now"):
        key_type(Run, "model.size", {"model": {"width": 1}})
