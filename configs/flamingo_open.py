r"""Trains a Flamingo between an open language model (Llama, Mistral, Qwen, GPT-NeoX, MPT or
OPT) and an open vision encoder (CLIP or SigLIP), on your own datasets.

    python -m launch.train \
        --config=configs/flamingo_open.py:h200_8,models/Qwen3-8B,models/siglip-so400m-patch14-384 \
        --workdir=runs/open

The argument is `form,language_model,encoder,datasets,root`, as KEY=VALUE pairs or as values in
this order. All of them are optional:

- form: `tiny` for a laptop, or a machine of `MACHINES`; without it, set config.mesh.
- language_model, encoder: folders as Hugging Face's transformers save them, or exports.
  Weights and tokenizer are read from there. For `launch.plan` the folder may be missing, if it
  has the name of a model in flamingo_jax/interop/published.py.
- datasets: folders in `data/` (for tiny, in runs/quickstart/data) with their kind, joined by
  +: `obelics=pages+coco=pairs+clips=videos`.
- root: the folder that contains these folders, `root=/shared`.

    python -m launch.plan --config=configs/flamingo_open.py:v5e_64 --counts --topology=v5e:8x8

The resampler, the gated blocks and the embedding of <EOC> are trained, in float32; the
language model and the encoder are frozen, in bfloat16. There is a gated block before every 4th
layer, as in Flamingo-9B; a smaller `xattn_every` costs memory and time and gives better
results (paper, table 3).
"""

import dataclasses
import os
import pathlib
from typing import Any, Literal

import ml_collections

from configs import base
from flamingo_jax.configuring import from_json, to_config
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    DatasetConfig,
    Experiment,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    MeshConfig,
    OptimizerConfig,
    PositionsConfig,
    ResamplerConfig,
    TrainingConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.processing.tokenizer import tokenizer_file

KEYS = ("form", "language_model", "encoder", "datasets", "root")
LANGUAGE_MODEL = "models/Qwen3-8B"
VISION_ENCODER = "models/siglip-so400m-patch14-384"
DATASETS = "pages=pages+pairs=pairs+videos=videos"
TINY_DATASETS = "m3w=pages+ltip=pairs+vtp=videos"

# MeshConfig(data, fsdp, model)
MACHINES = {
    # One GPU of 141 GB: microbatches that fit beside 16 GB of frozen weights and 16 bytes per
    # trained parameter.
    "h200_1": base.Machine(MeshConfig(1, 1, 1), microbatches=8),
    "h200_8": base.Machine(MeshConfig(1, 8, 1)),
    # 64 chips of 16 GB: the frozen language model is sharded over 4 chips, trained parameters
    # over all.
    "v5e_64": base.Machine(MeshConfig(1, 16, 4), microbatches=2),
}

KINDS = {
    "pages": DatasetConfig(
        "pages", batch_size=64, max_length=256, visuals=5, weight=1.0, p_next=0.5
    ),
    # Several captions fit into a row: those of published datasets have 10 to 30 tokens.
    "pairs": DatasetConfig("pairs", batch_size=64, max_length=128, visuals=4, weight=0.2),
    "videos": DatasetConfig(
        "videos", batch_size=64, max_length=64, visuals=1, frames=8, weight=0.03
    ),
}

TINY_LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=384,
    layers=4,
    width=64,
    attention=AttentionConfig(heads=4, head_width=16, kv_heads=2),
    feed_forward=FeedForwardConfig(width=128, activation="silu", gated=True),
    positions=PositionsConfig(kind="rotary"),
    tied_embeddings=False,
)
TINY_VISION = VisionConfig(
    image_size=48, vit=ViTConfig(patch_size=8, layers=2, width=64, heads=4, feed_forward=128)
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the argument `form,language_model,encoder,datasets,root`."""
    given = base.arguments(arg, "flamingo_open", KEYS, pairs=("datasets",))
    form, datasets = given["form"], given["datasets"]
    root = base.root_of(given["root"], form)
    # Models are not below the default root of tiny forms, which has the quickstart's data
    # only.
    language_model, encoder = (
        path and os.path.join(given["root"], path)
        for path in (given["language_model"], given["encoder"])
    )
    if form == base.TINY:
        return to_config(_tiny(language_model, encoder, datasets or TINY_DATASETS, root))
    experiment = _experiment(
        language_model or os.path.join(root, LANGUAGE_MODEL),
        encoder or os.path.join(root, VISION_ENCODER),
        _datasets(datasets or DATASETS, root),
    )
    return to_config(base.on_machine(experiment, form, "flamingo_open", MACHINES))


def _experiment(language_model: str, encoder: str, data: dict[str, DatasetConfig]) -> Experiment:
    lm, vision = _config_of(language_model, "language_model"), _config_of(encoder, "vision_encoder")
    return Experiment(
        name=f"{pathlib.Path(language_model).name} on {pathlib.Path(encoder).name}",
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=vision,
            language_model=lm,
            resampler=ResamplerConfig(),
            conditioning=ConditioningConfig(
                xattn_every=4,
                heads=lm.attention.heads,
                head_width=lm.attention.head_width,
                # As in the paper, 4 times the width; the language model's own feed-forward
                # width may differ, for example with SwiGLU.
                feed_forward=4 * lm.width,
            ),
        ),
        tokenizer=language_model,
        data=data,
        held_out=base.held_out(data),
        optimizer=OptimizerConfig(),
        training=TrainingConfig(
            steps=250_000,
            remat="products",
            frames_at_once=64,
            loss="sequence_sum",
        ),
        vision_encoder_from=encoder,
        language_model_from=language_model,
    )


def _tiny(language_model: str, encoder: str, datasets: str, root: str) -> Experiment:
    """Makes the laptop form: small trained parts between the given models, or between small
    random ones, on the data of the quickstart.
    """
    lm = _config_of(language_model, "language_model") if language_model else TINY_LANGUAGE_MODEL
    vision = _config_of(encoder, "vision_encoder") if encoder else TINY_VISION
    data = {
        name: dataclasses.replace(
            dataset, batch_size=base.TINY_ROWS, max_length=base.TINY_LENGTHS[dataset.kind]
        )
        for name, dataset in _datasets(datasets, root).items()
    }
    own = language_model and tokenizer_file(language_model) is not None
    return Experiment(
        name="open models, tiny",
        task="flamingo",
        flamingo=FlamingoConfig(
            vision=vision,
            language_model=lm,
            resampler=ResamplerConfig(
                layers=2,
                width=64,
                heads=4,
                head_width=16,
                latents=8,
                frames=8,
                feed_forward=256,
            ),
            conditioning=ConditioningConfig(
                xattn_every=2,
                heads=4,
                head_width=16,
                feed_forward=256,
            ),
        ),
        tokenizer=language_model if own else os.path.join(root, base.DATA, "tokenizer"),
        data=data,
        held_out=base.held_out(data),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        training=TrainingConfig(
            steps=100,
            log_every=5,
            evaluate_every=50,
            evaluate_batches=2,
            save_every=50,
            compute_dtype="float32",
        ),
        vision_encoder_from=encoder or "random",
        language_model_from=language_model or "random",
    )


def _config_of(folder: str, part: Literal["language_model", "vision_encoder"]) -> Any:
    """Reads the config of a published folder or an export. For a missing folder, returns the
    config of the public model of that name.
    """
    # Imported here, since they are slow to import and --help does not need them.
    from flamingo_jax.checkpointing.export import open_export
    from flamingo_jax.interop.folders import is_published_folder, read_config
    from flamingo_jax.interop.published import published

    kind: type = LanguageModelConfig if part == "language_model" else VisionConfig
    if pathlib.Path(folder).is_dir():
        if is_published_folder(folder):
            return read_config(folder, part)
        export = open_export(folder)
        return from_json(
            kind,
            export.config["vision"] if export.kind == "contrastive" else export.config,
            f"the config of {folder}",
        )
    found = published(pathlib.Path(folder).name)
    if not isinstance(found, kind):
        raise UserError(
            f"{folder} is no folder, and no model is known by that name: copy one there with"
            " its config.json and safetensors"
        )
    return found


def _datasets(text: str, root: str) -> dict[str, DatasetConfig]:
    found: dict[str, DatasetConfig] = {}
    for part in text.split("+"):
        name, _, kind = part.partition("=")
        if not name or kind not in KINDS:
            raise UserError(
                f"the dataset {part!r} must be FOLDER=KIND with one of the kinds {', '.join(KINDS)}"
            )
        found[name] = dataclasses.replace(KINDS[kind], path=os.path.join(root, base.DATA, name))
    return found
