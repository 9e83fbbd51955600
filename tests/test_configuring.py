"""Dataclasses to ConfigDicts and JSON and back, and what is refused on the way."""

import dataclasses
import importlib
import json

import pytest

from flamingo_jax.configuring import from_config, from_json, key_type, to_config, to_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    ConditioningConfig,
    DatasetConfig,
    Experiment,
    FlamingoConfig,
    LanguageModelConfig,
    MeshConfig,
    OptimizerConfig,
)

FULL = Experiment(
    name="x",
    flamingo=FlamingoConfig(
        language_model=LanguageModelConfig(layers=3), conditioning=ConditioningConfig(xattn_every=2)
    ),
    data={"a": DatasetConfig(weight=1), "b": DatasetConfig(kind="pages")},
    optimizer=OptimizerConfig(weight_decay_exclude=("a.*", "b")),
)
CONFIGS = (
    "flamingo_3b",
    "flamingo_9b",
    "flamingo_80b",
    "contrastive_nfnet_f6",
    "lm_1b4",
    "lm_7b",
    "lm_70b",
)


@pytest.mark.parametrize("experiment", [Experiment(), FULL])
def test_round_trips(experiment: Experiment) -> None:
    assert from_config(Experiment, to_config(experiment)) == experiment
    assert from_json(Experiment, json.loads(json.dumps(to_json(experiment)))) == experiment


def test_an_override_becomes_part_of_the_experiment() -> None:
    config = to_config(FULL)
    config.data.a.weight = 0.5
    config.flamingo.language_model.layers = 9
    config.optimizer.weight_decay_exclude = ("c",)
    experiment = from_config(Experiment, config)
    assert (
        experiment.data["a"].weight == 0.5
        and experiment.flamingo is not None
        and experiment.flamingo.language_model.layers == 9
    )
    assert (
        experiment.optimizer.weight_decay_exclude == ("c",)
        and experiment.data["b"] == FULL.data["b"]
    )


def test_ints_stand_for_floats_and_missing_keys_for_defaults() -> None:
    assert type(to_config(FULL).data.a.weight) is float
    assert from_json(MeshConfig, {"model": 2}) == MeshConfig(model=2)
    assert type(from_json(OptimizerConfig, {"learning_rate": 1}).learning_rate) is float


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"sede": 1}, "config has no key 'sede', did you mean seed?"),
        ({"mesh": {"zzz": 1}}, "config.mesh has no key 'zzz': it has data, fsdp, model"),
        ({"seed": "1"}, "config.seed is '1', but must be an int"),
        ({"seed": True}, "config.seed is True, but must be an int"),
        (
            {"training": {"use_visuals": 1}},
            "config.training.use_visuals is 1, but must be a bool",
        ),
        (
            {"optimizer": {"learning_rate": "fast"}},
            "config.optimizer.learning_rate is 'fast', but must be a float",
        ),
        (
            {"task": "sleep"},
            (
                "config.task is 'sleep', but must be one of 'contrastive',"
                " 'language_modelling', 'flamingo'"
            ),
        ),
        (
            {"optimizer": {"weight_decay_exclude": "a"}},
            "config.optimizer.weight_decay_exclude is 'a', but must be a tuple of strings",
        ),
        (
            {"optimizer": {"weight_decay_exclude": ["a", 2]}},
            "config.optimizer.weight_decay_exclude[1] is 2, but must be a string",
        ),
        (
            {"data": {"m3w": {"max_lenght": 3}}},
            "config.data.m3w has no key 'max_lenght', did you mean max_length or weight?",
        ),
        ({"data": {"m3w": 3}}, "config.data.m3w is 3, but must be a DatasetConfig"),
        ({"flamingo": 3}, "config.flamingo is 3, but must be a FlamingoConfig"),
        ({"mesh": None}, "config.mesh is None, but must be a MeshConfig"),
    ],
)
def test_what_does_not_fit_is_one_sentence(document: dict, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_json(Experiment, document)
    assert sentence in str(error.value)


def test_types_of_dotted_keys() -> None:
    config = to_config(FULL)
    assert key_type(Experiment, "data.a.weight", config) is float
    assert key_type(Experiment, "flamingo.language_model.layers", config) is int
    for key, sentence in (
        ("data.c.weight", "config.data has no key 'c'"),
        ("contrastive.joint_width", "config.contrastive is None"),
        ("seed.x", "config.seed is an int"),
    ):
        with pytest.raises(UserError, match=sentence):
            key_type(Experiment, key, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_full_and_a_tiny_form(name: str) -> None:
    get_config = importlib.import_module(f"configs.{name}").get_config
    full, tiny = (from_config(Experiment, get_config(*arg)) for arg in ((), ("tiny",)))
    assert (
        full.task == tiny.task
        and set(full.data) == set(tiny.data)
        and full.held_out.keys() == full.data.keys()
    )
    with pytest.raises(UserError, match=":tiny"):
        get_config("huge")


ALL = [*CONFIGS, "flamingo_open", "quickstart", "own_data", "vqa"]
"""The configs that read files."""


def paths(experiment: Experiment) -> list[str]:
    parts = (experiment.data, experiment.held_out)
    found = [dataset.path for part in parts for dataset in part.values()]
    found += [
        experiment.tokenizer,
        experiment.vision_encoder_from,
        experiment.language_model_from,
    ]
    return [path for path in [*found, experiment.flamingo_from] if path not in ("", "random")]


@pytest.mark.parametrize("name", ALL)
def test_every_config_takes_a_root(name: str) -> None:
    """All that it reads lies below it, at the same places as below the folder of the command."""
    module = importlib.import_module(f"configs.{name}")
    for form in ("", *(["tiny"] if hasattr(module, "MACHINES") else ())):
        given = [f"form={form}"] if form else []
        here = from_config(Experiment, module.get_config(",".join(given)))
        with_root = from_config(Experiment, module.get_config(",".join([*given, "root=/shared"])))
        assert all(path.startswith("/shared/") for path in paths(with_root)) and paths(with_root)
        own = getattr(module, "ROOT", f"runs/{name.replace('own_data', 'mine')}")
        default = "runs/quickstart/" if form else "" if hasattr(module, "MACHINES") else f"{own}/"
        assert [path.replace("/shared/", default, 1) for path in paths(with_root)] == paths(here)
        assert dataclasses.replace(with_root, **{f: getattr(here, f) for f in PLACES}) == here


PLACES = (
    "data",
    "held_out",
    "tokenizer",
    "vision_encoder_from",
    "language_model_from",
    "flamingo_from",
)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("flamingo_3b:v4_2x2x4", "form=v4_2x2x4"),
        ("lm_70b:v5p_8x8x4,/shared", "root=/shared,form=v5p_8x8x4"),
        ("contrastive_nfnet_f6:,/a b", "root=/a b"),
        ("quickstart:contrastive,runs/steps", "stage=contrastive,root=runs/steps"),
        ("own_data:flamingo,/x=1/a", "root=/x=1/a"),
        ("vqa:finetune", "root=runs/vqa,stage=finetune"),
        (
            "flamingo_open:h200_1,models/Qwen3-0.6B,models/siglip-base-patch16-224,photos=pairs",
            (
                "form=h200_1,language_model=models/Qwen3-0.6B,encoder=models/siglip-base-patch16-224,"
                "datasets=photos=pairs"
            ),
        ),
        (
            "flamingo_open:tiny,,,a=pages+b=pairs,/x",
            "form=tiny,root=/x,datasets=a=pages+b=pairs",
        ),
    ],
)
def test_the_short_form_of_an_argument_is_its_values_in_order(short: str, long: str) -> None:
    name, _, argument = short.partition(":")
    get_config = importlib.import_module(f"configs.{name}").get_config
    both = [from_config(Experiment, get_config(text)) for text in (argument, long)]
    assert both[0] == both[1]


def test_a_folder_may_have_commas() -> None:
    config = importlib.import_module("configs.quickstart").get_config("contrastive,/a,b,c")
    assert config.tokenizer == "/a,b,c/data/tokenizer"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "flamingo_3b:form=tiny,rooot=/x",
            "takes form=...,root=..., but no 'rooot', did you mean root?",
        ),
        (
            "quickstart:form=flamingo",
            "configs/quickstart.py takes stage=...,root=..., but no 'form'",
        ),
        ("flamingo_9b:form=tiny,form=h200_8", "but form is given twice"),
        ("flamingo_9b:tiny,form=h200_8", "but form is given twice"),
        ("flamingo_80b:root=/x,tiny", "and 'tiny' follows one of these: give it a key as well"),
        ("flamingo_open:root=/x,a=pairs", "but no 'a'"),
        ("flamingo_open:tiny,m=pages", "but no 'm'"),
        ("vqa:stage=huge", "configs/vqa.py has no stage 'huge'"),
        ("own_data:huge,/x", "configs/own_data.py has no stage 'huge'"),
    ],
)
def test_an_argument_of_another_grammar_is_refused(argument: str, sentence: str) -> None:
    name, _, text = argument.partition(":")
    with pytest.raises(UserError) as caught:
        importlib.import_module(f"configs.{name}").get_config(text)
    assert sentence in str(caught.value)
