"""Every config in every form: it is built, has the schema's form, and its batches and its model
fit the machine that its name says.
"""

import dataclasses
import functools
import importlib
import math
import pathlib
import re

import jax
import pytest
from flax import nnx

from configs.base import arguments
from flamingo_jax.configuring import from_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning import rules
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks import stages

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py") if "get_config" in file.read_text())
SIZES = (
    "layers=2,width=64,heads=2,vocab=384,xattn_every=1,vit_layers=1,vit_width=64,vit_heads=2,"
    "image=32,patch=16,interleaved=8x2x64,pairs=8x1x32"
)
CHIPS = re.compile(r"(?:v\d+[ep]?|h200)_(\d+(?:x\d+)*)")


def forms(name: str) -> list[str]:
    """Every argument that a config has a form for."""
    module = importlib.import_module(f"configs.{name}")
    if name == "benchmark":
        return [SIZES]
    if name == "ablations":
        sizes = ("", "tiny", *module.MACHINES)
        rows = [f"form={row},size=tiny" for row in module.ABLATIONS]
        return rows + [f"size={size}" if size else "" for size in sizes]
    for choices in ("STAGES", "TASKS"):
        if hasattr(module, choices):
            return ["", *getattr(module, choices)]
    return ["", "tiny", *module.MACHINES]


FORMS = [(name, form) for name in NAMES for form in forms(name)]


def experiment(name: str, form: str) -> Experiment:
    config = importlib.import_module(f"configs.{name}").get_config(form)
    return from_config(Experiment, config)


@functools.cache
def shapes(task: str, model: object, remat: str) -> dict[str, object]:
    """Of the model's parameters; the same for all forms that differ in their machine alone."""
    made = Experiment(task=task)  # type: ignore[arg-type]
    made = dataclasses.replace(made, **{stages.MODEL_FIELD[task]: model})
    key = jax.random.key(0)
    return to_flat(nnx.eval_shape(lambda: nnx.state(stages.build_model(made, nnx.Rngs(key)))))


@pytest.mark.parametrize(("name", "form"), FORMS, ids=lambda text: text or "default")
def test_a_config_is_whole(name: str, form: str) -> None:
    made = experiment(name, form)
    assert (made.data and made.tokenizer != "") or name == "benchmark"
    mesh = made.mesh
    fixed = [size for size in (mesh.data, mesh.fsdp, mesh.model) if size != -1]
    found = CHIPS.search(form)
    if found and form != "tiny":
        chips = math.prod(map(int, found[1].split("x")))
        left = chips // math.prod(fixed)
        assert chips == math.prod(fixed) * (left if len(fixed) < 3 else 1)
        rows = (left if mesh.data == -1 else mesh.data) * mesh.fsdp
        for dataset in (*made.data.values(), *made.held_out.values()):
            assert dataset.batch_size % (rows * dataset.microbatches) == 0
    # Then one stream has them all.
    parts = {d.microbatches for d in made.data.values()}
    assert made.training.round_robin or made.task != "flamingo" or len(parts) == 1
    for evaluator in made.evaluators.values():
        assert evaluator.path


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ablations"])
def test_every_parameter_has_its_rule(name: str) -> None:
    """Of each different model; ablations are trained by a test of their own."""
    seen = set()
    for form in forms(name):
        made = experiment(name, form)
        model = stages.model_config(made)
        unfrozen = stages.unfrozen(made)
        if (model, unfrozen) in seen:
            continue
        seen.add((model, unfrozen))
        names = shapes(made.task, model, made.training.remat)
        trained = rules.trainable_names(made.task, names, unfrozen)
        assert trained and trained <= set(names)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "benchmark"])
def test_an_argument_has_one_grammar(name: str) -> None:
    """KEY=VALUE pairs, or values in their order; root= moves every path."""
    module = importlib.import_module(f"configs.{name}")
    first = next((k for k in ("stage", "task") if hasattr(module, f"{k.upper()}S")), "form")
    form = next(form for form in forms(name) if form).partition(",")[0].partition("=")[2] or "tiny"
    form = {"form": form, "stage": "contrastive", "task": "coco"}[first]
    made = experiment(name, f"{first}={form},root=/shared")
    assert all(d.path.startswith("/shared/") for d in made.data.values())
    with pytest.raises(UserError, match=f"configs/{name}.py"):
        experiment(name, f"{first}=nonsense")
    with pytest.raises(UserError, match=f"configs/{name}.py takes .*root=..., but no 'rot'"):
        experiment(name, f"{first}={form},rot=x")


def test_arguments_may_stand_in_their_order() -> None:
    assert arguments("tiny,/a,b", "c", ("form", "root")) == {"form": "tiny", "root": "/a,b"}
    with pytest.raises(UserError, match="root is given twice"):
        arguments("root=a,root=b", "c", ("form", "root"))
