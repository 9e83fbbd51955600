"""Parts that the configs share: the parser of their argument; the paper's data mixture,
language models and optimizer; and the `tiny` form of every config.

A config's argument is a list of comma-separated KEY=VALUE pairs, `form=v4_2x2x4,root=/shared`.
Values without a key are assigned to the config's keys in their order, `v4_2x2x4,/shared`.
Every config that reads files has the key `root`, the folder of all relative paths, which holds
data/ and exports/, models/ or the exports of earlier stages.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from flamingo_jax.configuring import did_you_mean
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    ContrastiveConfig,
    DatasetConfig,
    Experiment,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    MeshConfig,
    OptimizerConfig,
    ResamplerConfig,
    TextEncoderConfig,
    TrainingConfig,
    VisionConfig,
)

DATA = "data"
"""Folder of the datasets and the tokenizer, below the root."""
EXPORTS = "exports"
"""Folder of the exported stages, below the root."""
TINY = "tiny"
"""Name of the form that fits a laptop, which every config has."""
TINY_ROOT = "runs/quickstart"
"""Default root of tiny forms: the quickstart makes its data there (or `python -m
launch.build_data quickstart --output=runs/quickstart/data` does)."""

LM_1B4 = LanguageModelConfig(
    layers=24,
    width=2048,
    attention=AttentionConfig(heads=16),
    feed_forward=FeedForwardConfig(width=8192),
)
LM_7B = LanguageModelConfig(
    layers=32,
    width=4096,
    attention=AttentionConfig(heads=32),
    feed_forward=FeedForwardConfig(width=16384),
)
LM_70B = LanguageModelConfig(
    layers=80,
    width=8192,
    attention=AttentionConfig(heads=64),
    feed_forward=FeedForwardConfig(width=32768),
)

COLOUR = 0.2
"""Strength of colour augmentation, which the paper uses without giving its strength."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Mesh and number of microbatches for one kind of machine. microbatches: of every dataset,
    held-out ones included.
    """

    mesh: MeshConfig
    microbatches: int = 1


def arguments(
    argument: str, config: str, keys: Sequence[str], pairs: Collection[str] = ()
) -> dict[str, str]:
    """Parses a config's argument.

    Args:
      config: the config's name, for error messages.
      keys: keys of the config, in the order of values without a key; the last of such values
        may contain commas, as a folder's name may.
      pairs: the keys whose own values have the form NAME=VALUE.

    Returns: {key: value}, with "" for keys that are not given.
    Raises: UserError for a key that is unknown or given twice, or a value without a key after
      a value with one.
    """
    takes = f"configs/{config}.py takes {','.join(f'{key}=...' for key in keys)}"
    found: dict[str, str] = {}
    named = False
    # KEY=VALUE, or a value for the key of this place, or a part of the last value.
    for place, part in enumerate(argument.split(",") if argument else ()):
        here = keys[min(place, len(keys) - 1)]
        key, equals, value = part.partition("=")
        if key in keys and equals:
            named = True
        elif re.fullmatch(r"\w+=.*", part) and (named or here not in pairs):
            raise UserError(f"{takes}, but no {key!r}{did_you_mean(key, keys)}")
        elif named:
            raise UserError(f"{takes}, and {part!r} follows one of these: give it a key as well")
        elif place >= len(keys):
            found[here] += f",{part}"
            continue
        else:
            key, value = here, part
        if key in found:
            raise UserError(f"{takes}, but {key} is given twice")
        found[key] = value
    return {key: found.get(key, "") for key in keys}


def apply_form(
    experiment: Experiment, arg: str, config: str, machines: dict[str, Machine]
) -> Experiment:
    """Adapts an experiment to a config's argument `form,root`. The form is "" for the
    experiment as it is, "tiny" for a laptop, or one of the machines.

    Raises: UserError for another form, or a malformed argument.
    """
    given = arguments(arg, config, ("form", "root"))
    form = given["form"]
    return with_root(on_machine(experiment, form, config, machines), root_of(given["root"], form))


def stage_of(
    arg: str, config: str, stages: Mapping[str, Callable[[str], Experiment]], root: str
) -> Experiment:
    """Makes the stage of a config's argument `stage,root`, by default the Flamingo.

    stages: {name: function from a root folder to the experiment}. root: the default root.

    Raises: UserError for another stage, or a malformed argument.
    """
    given = arguments(arg, config, ("stage", "root"))
    stage = given["stage"] or "flamingo"
    if stage not in stages:
        raise UserError(
            f"configs/{config}.py has no stage {stage!r}: choose one of {', '.join(stages)}"
        )
    return stages[stage](given["root"] or root)


def root_of(root: str, form: str) -> str:
    """Returns the root of relative paths; "" is the current folder."""
    return root or (TINY_ROOT if form == TINY else "")


def on_machine(
    experiment: Experiment, form: str, config: str, machines: dict[str, Machine]
) -> Experiment:
    """Adapts an experiment to a form (see `apply_form`): its mesh and microbatches, or small
    sizes.
    """
    if not form:
        return experiment
    if form == TINY:
        return tiny(experiment)
    if form not in machines:
        forms = ", ".join(f":{name}" for name in (TINY, *machines))
        raise UserError(
            f"configs/{config}.py has no form {form!r}: choose one of {forms}, or leave it away"
            " and set config.mesh"
        )
    machine = machines[form]

    def in_parts(datasets: dict[str, DatasetConfig]) -> dict[str, DatasetConfig]:
        count = machine.microbatches
        return {name: dataclasses.replace(d, microbatches=count) for name, d in datasets.items()}

    return dataclasses.replace(
        experiment,
        name=f"{experiment.name} on {form}",
        mesh=machine.mesh,
        data=in_parts(experiment.data),
        held_out=in_parts(experiment.held_out),
    )


def with_root(experiment: Experiment, root: str) -> Experiment:
    """Prefixes every relative path of an experiment with `root`; "" changes nothing."""

    def below(path: str) -> str:
        return path if path in ("", "random") else os.path.join(root, path)

    def datasets(part: dict[str, DatasetConfig]) -> dict[str, DatasetConfig]:
        return {name: dataclasses.replace(d, path=below(d.path)) for name, d in part.items()}

    return dataclasses.replace(
        experiment,
        tokenizer=below(experiment.tokenizer),
        data=datasets(experiment.data),
        held_out=datasets(experiment.held_out),
        evaluators={
            name: dataclasses.replace(evaluator, path=below(evaluator.path))
            for name, evaluator in experiment.evaluators.items()
        },
        vision_encoder_from=below(experiment.vision_encoder_from),
        language_model_from=below(experiment.language_model_from),
        flamingo_from=below(experiment.flamingo_from),
    )


def mixture(
    m3w: int = 256, align: int = 512, ltip: int = 512, vtp: int = 64
) -> dict[str, DatasetConfig]:
    """Makes the four datasets of the paper (2.4, A.3) with these batch sizes, by default those
    of the ablation study, the only published ones.

    Each row has one example, so that a batch has as many sequences as published. A page gives
    a window of 256 tokens and the first 5 images in it; if the page is shorter, the rest of
    the row is padding. Texts of pairs have 32 or 64 tokens "depending on the dataset": ALIGN's
    captions are the shorter ones (12.4 tokens on average, LTIP's 20.5).
    """
    data = {
        "m3w": DatasetConfig(
            "pages",
            f"{DATA}/m3w",
            batch_size=m3w,
            max_length=256,
            visuals=5,
            weight=1.0,
            p_next=0.5,
            pack=False,
        ),
        # The weights are the paper's: M3W 1, ALIGN and LTIP 0.2, VTP 0.03.
        "align": DatasetConfig(
            "pairs",
            f"{DATA}/align",
            batch_size=align,
            max_length=32,
            visuals=1,
            weight=0.2,
            pack=False,
        ),
        "ltip": DatasetConfig(
            "pairs",
            f"{DATA}/ltip",
            batch_size=ltip,
            max_length=64,
            visuals=1,
            weight=0.2,
            pack=False,
        ),
        "vtp": DatasetConfig(
            "videos",
            f"{DATA}/vtp",
            batch_size=vtp,
            max_length=64,
            visuals=1,
            frames=8,
            weight=0.03,
            pack=False,
        ),
    }
    return {name: dataclasses.replace(d, flip=True, colour=COLOUR) for name, d in data.items()}


def held_out(data: dict[str, DatasetConfig]) -> dict[str, DatasetConfig]:
    """Makes held-out datasets: the validation splits of `data`, without augmentation."""
    return {
        name: dataclasses.replace(d, split="validation", flip=False, colour=0.0)
        for name, d in data.items()
    }


def flamingo(
    name: str,
    language_model: LanguageModelConfig,
    every: int,
    *,
    lm_export: str,
    data: dict[str, DatasetConfig] | None = None,
    mesh: MeshConfig | None = None,
) -> Experiment:
    """Makes a Flamingo of the paper. All sizes have the same resampler and vision encoder; the
    gated blocks have the width and the number of heads of the language model.

    AdamW as in B.1.2: a constant learning rate of 1e-4 after 5,000 updates of warm-up,
    clipping to norm 1, weight decay 0.1 except on the resampler. The 500,000 steps are taken
    as updates: the paper does not say whether it counts updates or gradients of single
      datasets.
    """
    data = data or mixture()
    return Experiment(
        name=name,
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=VisionConfig("F6", image_size=320),
            language_model=language_model,
            resampler=ResamplerConfig(),
            conditioning=ConditioningConfig(
                xattn_every=every,
                heads=language_model.attention.heads,
                head_width=language_model.attention.head_width,
                feed_forward=language_model.feed_forward.width,
            ),
        ),
        tokenizer=f"{DATA}/tokenizer",
        data=data,
        held_out=held_out(data),
        optimizer=OptimizerConfig(),
        mesh=mesh or MeshConfig(),
        training=TrainingConfig(remat="products", frames_at_once=88),
        vision_encoder_from=f"{EXPORTS}/contrastive_nfnet_f6",
        language_model_from=f"{EXPORTS}/{lm_export}",
    )


def language_modelling(
    name: str,
    model: LanguageModelConfig,
    *,
    rate: float,
    rows: int,
    steps: int,
    mesh: MeshConfig,
) -> Experiment:
    """Makes a language model of the Chinchilla family (Hoffmann et al. 2022), trained on rows
    of 2,048 tokens, with a cosine schedule that ends at a tenth of the peak learning rate.
    """
    data = {"text": DatasetConfig("text", f"{DATA}/text", batch_size=rows, max_length=2048)}
    return Experiment(
        name=name,
        task="language_modelling",
        language_model=model,
        tokenizer=f"{DATA}/tokenizer",
        data=data,
        held_out=held_out(data),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            end_learning_rate=rate / 10,
            warmup_steps=1_500,
            schedule="cosine",
            beta2=0.95,
            weight_decay_exclude=(),
        ),
        mesh=mesh,
        training=TrainingConfig(steps=steps, loss="token_mean", remat="products"),
    )


def tiny(experiment: Experiment) -> Experiment:
    """Makes the laptop form of an experiment, on the data of the quickstart: the same
    structure, dataset weights and objective, with small sizes and few steps.

    Frozen parts have random weights ("random"); --config.vision_encoder_from and
    --config.language_model_from name exports in their place.
    """
    data = {name: _tiny_dataset(name, d) for name, d in experiment.data.items()}
    optimizer, training = experiment.optimizer, experiment.training
    return dataclasses.replace(
        experiment,
        name=f"{experiment.name} tiny",
        contrastive=experiment.contrastive and _tiny_contrastive(experiment.contrastive),
        language_model=experiment.language_model
        and _tiny_language_model(experiment.language_model, layers=2),
        flamingo=experiment.flamingo and _tiny_flamingo(experiment.flamingo),
        tokenizer=f"{DATA}/tokenizer",
        data=data,
        held_out=held_out(data),
        optimizer=dataclasses.replace(
            optimizer,
            learning_rate=1e-3,
            end_learning_rate=min(optimizer.end_learning_rate, 1e-4),
            warmup_steps=20,
        ),
        mesh=MeshConfig(),
        training=dataclasses.replace(
            training,
            steps=100,
            log_every=5,
            evaluate_every=50,
            evaluate_batches=2,
            save_every=50,
            compute_dtype="float32",
        ),
        vision_encoder_from=(experiment.vision_encoder_from or experiment.flamingo_from)
        and "random",
        language_model_from=(experiment.language_model_from or experiment.flamingo_from)
        and "random",
        flamingo_from="",
    )


TINY_ROWS = 16
"""Rows of a tiny batch: two for each of eight devices."""
TINY_LENGTHS = {"pages": 128, "pairs": 48, "videos": 32, "text": 128, "questions": 48}


def _tiny_dataset(name: str, dataset: DatasetConfig) -> DatasetConfig:
    # The captions of the synthetic world mention left and right, so images are not flipped.
    return dataclasses.replace(
        dataset,
        path=f"{DATA}/{name}",
        batch_size=TINY_ROWS,
        max_length=TINY_LENGTHS[dataset.kind],
        microbatches=1,
        flip=False,
        colour=0.0,
    )


def _tiny_vision(vision: VisionConfig) -> VisionConfig:
    vit = vision.vit and dataclasses.replace(
        vision.vit, patch_size=8, layers=2, width=64, heads=4, feed_forward=128
    )
    return dataclasses.replace(vision, variant="tiny", image_size=48, vit=vit)


def _tiny_language_model(model: LanguageModelConfig, layers: int) -> LanguageModelConfig:
    return dataclasses.replace(
        model,
        vocab_size=384,
        layers=layers,
        width=64,
        attention=dataclasses.replace(model.attention, heads=4, head_width=16),
        feed_forward=dataclasses.replace(model.feed_forward, width=256),
    )


def _tiny_flamingo(flamingo: FlamingoConfig) -> FlamingoConfig:
    # Two groups of layers, the last as long as in the full model: with a block at every 7th of
    # 80 layers, the last group has 3.
    every, layers = flamingo.conditioning.xattn_every, flamingo.language_model.layers
    return dataclasses.replace(
        flamingo,
        vision=_tiny_vision(flamingo.vision),
        language_model=_tiny_language_model(
            flamingo.language_model, every + (layers % every or every)
        ),
        resampler=dataclasses.replace(
            flamingo.resampler,
            layers=2,
            width=64,
            heads=4,
            head_width=16,
            latents=8,
            feed_forward=256,
        ),
        conditioning=dataclasses.replace(
            flamingo.conditioning,
            heads=4,
            head_width=16,
            feed_forward=256,
        ),
    )


def _tiny_contrastive(contrastive: ContrastiveConfig) -> ContrastiveConfig:
    return dataclasses.replace(
        contrastive,
        vision=_tiny_vision(contrastive.vision),
        text=TextEncoderConfig(vocab_size=384, layers=2, width=64, heads=4, max_length=24),
        joint_width=64,
    )
