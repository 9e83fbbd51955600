"""The rows of configs/ablations.py learn: the parts that only they have, in the loop itself."""

import dataclasses
import importlib
import pathlib
from typing import Any

import numpy as np
import pytest

from configs import ablations
from flamingo_jax.configuring import from_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.json_lines import read_lines
from flamingo_jax.planning.synthetic import full_batches
from flamingo_jax.training import loop
from tests.training import world


class Again:
    """The same batch for ever."""

    def __init__(self, batch: dict[str, np.ndarray]):
        self.batch = batch

    def __next__(self) -> dict[str, np.ndarray]:
        return dict(self.batch)

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: dict[str, int]) -> None:
        pass


def losses(experiment: Experiment, batches: dict[str, Any], workdir: pathlib.Path) -> list[float]:
    loop.train(experiment, {name: Again(b) for name, b in batches.items()}, {}, workdir)
    return [line["loss"] for line in read_lines(workdir / "metrics.jsonl")]


def tiny(form: str) -> Experiment:
    config = ablations.get_config(f"form={form},size=tiny")
    return from_config(Experiment, config)


FORMS = {
    "vanilla_xattn, transformer": (
        {"conditioning": {"kind": "vanilla_xattn", "gating": "none"}},
        {"resampler": {"kind": "transformer"}},
        {},
    ),
    "grafting, mlp, language model trained": (
        {"conditioning": {"kind": "grafting", "grafted_layers": 2}},
        {"resampler": {"kind": "mlp"}},
        {"unfreeze_language_model": True},
    ),
}
"""Two models that have all that is new in rows with models of their own."""


@pytest.mark.parametrize("name", FORMS)
def test_what_the_rows_add_learns(name: str, tmp_path: pathlib.Path) -> None:
    conditioning, resampler, training = FORMS[name]
    flamingo = world.FLAMINGO
    for part in (conditioning, resampler):
        ((field, changes),) = part.items()
        changed = dataclasses.replace(getattr(flamingo, field), **changes)
        flamingo = dataclasses.replace(flamingo, **{field: changed})
    experiment = world.experiment(
        flamingo=flamingo,
        data={"m3w": world.DATA["m3w"]},
        training=dataclasses.replace(
            world.experiment().training, steps=4, save_every=4, **training
        ),
    )
    found = losses(experiment, {"m3w": world.batch(world.DATA["m3w"], 0)}, tmp_path)
    assert len(found) == 4 and found[-1] < found[0]


@pytest.mark.scale
@pytest.mark.parametrize("form", ablations.ABLATIONS)
def test_every_row_trains_twenty_steps(form: str, tmp_path: pathlib.Path) -> None:
    experiment = tiny(form)
    experiment = dataclasses.replace(
        experiment,
        held_out={},
        training=dataclasses.replace(experiment.training, steps=20, log_every=1, save_every=20),
        # Rates of the first steps are a fraction of the highest, and one batch is soon learned.
        optimizer=dataclasses.replace(experiment.optimizer, warmup_steps=5),
    )
    found = losses(experiment, full_batches(experiment), tmp_path)
    assert len(found) == 20 and np.isfinite(found).all() and found[-1] < found[0]


def test_a_form_or_size_that_is_not_there() -> None:
    get_config = importlib.import_module("configs.ablations").get_config
    for argument, sentence in (
        ("form=vanila_xattn", "no form 'vanila_xattn', did you mean vanilla_xattn"),
        (
            "form=mlp,size=huge",
            "configs/ablations.py has no size 'huge': choose one of tiny, v4_2x2x4",
        ),
        ("form=mlp,kind=mlp", "but no 'kind'"),
    ):
        with pytest.raises(UserError, match=sentence):
            get_config(argument)


@pytest.mark.parametrize("size", ["", "tiny", "h200_8"])
@pytest.mark.parametrize("form", ablations.ABLATIONS)
def test_every_row_has_a_config_and_takes_a_root(form: str, size: str) -> None:
    config = from_config(Experiment, ablations.get_config(f"form={form},size={size},root=/shared"))
    paths = [config.tokenizer, *(d.path for d in config.data.values())]
    assert all(path.startswith("/shared/") for path in paths)
    assert config.held_out.keys() == config.data.keys()
    assert config.training.steps == (100 if size == "tiny" else 250_000)


def test_what_data_the_rows_have() -> None:
    data = {form: tiny(form).data for form in ablations.ABLATIONS}
    assert set(data["baseline"]) == {"m3w", "align", "ltip", "vtp"}
    assert set(data["no_pairs"]) == {"m3w", "vtp"} and set(data["m3w_only"]) == {"m3w"}
    assert set(data["laion_only"]) == {"laion"}
    full = from_config(Experiment, ablations.get_config("form=laion_pairs")).data
    assert full["laion"].batch_size == 1024 and full["laion"].weight == pytest.approx(0.4)
    assert data["p_next_1"]["m3w"].p_next == 1.0 and data["baseline"]["m3w"].p_next == 0.5
