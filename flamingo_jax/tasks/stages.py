"""The three training stages (contrastive, language modelling, Flamingo): the model and task of
each, and the parts that it takes pretrained from earlier stages.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from flamingo_jax import paths
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, LoRAConfig
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.quantised import quantise_part
from flamingo_jax.tasks.contrastive import ContrastiveTask
from flamingo_jax.tasks.flamingo import FlamingoTask
from flamingo_jax.tasks.language_modelling import LanguageModellingTask
from flamingo_jax.tasks.task import Task

MODEL_FIELD = {
    "contrastive": "contrastive",
    "language_modelling": "language_model",
    "flamingo": "flamingo",
}
"""Task -> the field of Experiment with its model's config; also the `kind` of its export."""


class ExportPath(NamedTuple):
    """Where an export holds a part.

    parameters: the prefix of its parameters' names; "" for none.
    config: the key of its config within the export's; "" for all of it.
    """

    parameters: str = ""
    config: str = ""

    @property
    def prefix(self) -> str:
        """The prefix with its separator: "vision/", or "" for none."""
        return f"{self.parameters}/" if self.parameters else ""


EXPORT_PATHS = {
    "vision_encoder": {
        "contrastive": ExportPath("vision", "vision"),
        "vision_encoder": ExportPath(),
    },
    "language_model": {"language_model": ExportPath()},
}
"""{part: {kind of an export that holds it: where}}; the kind of the part's own stage first."""

FLAMINGO_PATHS = {
    "vision_encoder": ExportPath("vision_encoder", "vision"),
    "language_model": ExportPath("language_model", "language_model"),
}
"""{part: where the export of a Flamingo holds it}."""


class PretrainedPart(NamedTuple):
    """A part of the model whose weights come from an export or a published model."""

    name: str
    """Name of the part in this model, the prefix of its parameters; "" for the whole model."""
    folder: str
    """Exported or published folder, or "random" for untrained weights (benchmarks, tests)."""
    config: Any
    """The part's config in this experiment."""
    field: str
    """The field of Experiment that names the folder."""
    export_paths: Mapping[str, ExportPath]
    """{kind of an export that holds the part: where}."""


def model_config(experiment: Experiment) -> Any:
    """Returns the config of the task's model.

    Raises: UserError where the experiment lacks it.
    """
    field = MODEL_FIELD[experiment.task]
    config = getattr(experiment, field)
    if config is None:
        raise UserError(
            f"config.{field} is empty, but task {experiment.task!r} trains that model: fill it in"
        )
    return config


def build_model(experiment: Experiment, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the task's model with random parameters."""
    config, quantised = model_config(experiment), quantised_parts(experiment)
    dtype = jnp.dtype(experiment.training.compute_dtype)
    if experiment.task == "contrastive":
        return DualEncoder(config, rngs=rngs, dtype=dtype)
    _require_positions(experiment)
    if experiment.task == "language_modelling":
        language_model = LanguageModel(
            config, rngs=rngs, dtype=dtype, remat=experiment.training.remat, lora=lora(experiment)
        )
        if quantised:
            quantise_part(language_model)
        return language_model
    flamingo = Flamingo(
        config,
        rngs=rngs,
        dtype=dtype,
        remat=experiment.training.remat,
        frames_at_once=experiment.training.frames_at_once,
        encoder_trains="vision_encoder" in unfrozen(experiment),
        lora=lora(experiment),
    )
    for part in quantised:
        quantise_part(getattr(flamingo, part))
    return flamingo


def frozen_dtype(experiment: Experiment) -> str:
    """Returns the name of the dtype of those frozen arrays that are not integers or scales."""
    dtype = experiment.training.frozen_dtype
    return experiment.training.compute_dtype if dtype in ("compute_dtype", "int8") else dtype


def quantised_parts(experiment: Experiment) -> tuple[str, ...]:
    """Returns the frozen PARTS that are kept as int8 ("language_model" where that is the whole
    model).

    Raises: UserError where nothing is frozen.
    """
    if experiment.training.frozen_dtype != "int8":
        return ()
    parts = tuple(part for part in PARTS if part not in unfrozen(experiment))
    if experiment.task == "language_modelling":
        parts = ("language_model",) if lora(experiment) else ()
    elif experiment.task != "flamingo":
        parts = ()
    if not parts:
        raise UserError(
            "config.training.frozen_dtype is 'int8', but nothing of this run's model is frozen:"
            " leave it at 'compute_dtype'"
        )
    return parts


def _require_positions(experiment: Experiment) -> None:
    """Raises UserError for a dataset whose rows are longer than the language model's table of
    learned positions.
    """
    config = model_config(experiment)
    positions = getattr(config, "language_model", config).positions
    if positions.kind != "learned":
        return
    for group in ("data", "held_out"):
        for name, dataset in getattr(experiment, group).items():
            if dataset.max_length > positions.max_length:
                raise UserError(
                    f"config.{group}.{name}.max_length is {dataset.max_length}, but the language"
                    f" model has learned {positions.max_length} positions: make it no more"
                )


def make_task(experiment: Experiment) -> Task:
    """Makes the task of a stage from its config."""
    training = experiment.training
    if experiment.task == "contrastive":
        return ContrastiveTask(model_config(experiment))
    if experiment.task == "language_modelling":
        return LanguageModellingTask(training.loss)
    return FlamingoTask(training.loss, training.use_visuals)


PARTS = ("vision_encoder", "language_model")
"""The parts of a Flamingo that are pretrained, and by default frozen."""


def unfrozen(experiment: Experiment) -> tuple[str, ...]:
    """Returns the PARTS that `config.training.unfreeze_*` trains.

    Raises: UserError where the task freezes nothing.
    """
    parts = tuple(part for part in PARTS if getattr(experiment.training, f"unfreeze_{part}"))
    if parts and experiment.task != "flamingo":
        raise UserError(
            f"config.training.unfreeze_{parts[0]} is on, but task {experiment.task!r} freezes"
            " nothing: turn it off"
        )
    return parts


def lora(experiment: Experiment) -> LoRAConfig | None:
    """Returns the LoRA config of the frozen language model; None without LoRA.

    Raises: UserError where there is no frozen language model.
    """
    config = experiment.training.lora
    if not config.rank:
        return None
    if experiment.task == "contrastive":
        raise UserError(
            "config.training.lora updates a language model, but task 'contrastive' has none: set"
            " its rank to 0"
        )
    if experiment.training.unfreeze_language_model:
        raise UserError(
            "config.training.lora trains updates of a frozen language model, but"
            " config.training.unfreeze_language_model trains all of it: turn one of them off"
        )
    return config


def frozen_parts(experiment: Experiment, parts: Collection[str] = PARTS) -> list[PretrainedPart]:
    """Returns the frozen ones of `parts`, with the folders their weights come from. In
    language modelling with `training.lora` the whole model is frozen.

    Raises: UserError where a folder is not named or missing.
    """
    if experiment.task == "language_modelling" and lora(experiment):
        return [_from_folder(experiment, "language_model", model_config(experiment))]
    if experiment.task != "flamingo":
        return []
    return [
        _pretrained_part(experiment, part)
        for part in PARTS
        if part in parts and part not in unfrozen(experiment)
    ]


def warm_started_parts(experiment: Experiment) -> list[PretrainedPart]:
    """Returns the trained parts that start from pretrained weights; all others are initialised
    randomly.

    Raises: UserError as `frozen_parts`.
    """
    if experiment.task != "flamingo":
        return []
    if experiment.flamingo_from:
        return [_of_flamingo(experiment, "", model_config(experiment), ExportPath())]
    return [
        part
        for part in (_pretrained_part(experiment, part) for part in unfrozen(experiment))
        if part.folder != "random"
    ]


def _pretrained_part(experiment: Experiment, part: str) -> PretrainedPart:
    """Finds a part's weights: in its own folder, or in that of a whole Flamingo."""
    path = FLAMINGO_PATHS[part]
    part_config = getattr(model_config(experiment), path.config)
    if experiment.flamingo_from:
        return _of_flamingo(experiment, part, part_config, path)
    return _from_folder(experiment, part, part_config)


def _from_folder(experiment: Experiment, part: str, config: Any) -> PretrainedPart:
    """Finds a part in a folder of its own, `config.<part>_from`; outside of the Flamingo stage
    the part is the whole model.
    """
    field = f"{part}_from"
    folder = getattr(experiment, field)
    stage = next(iter(EXPORT_PATHS[part]))
    if not folder:
        raise UserError(
            f"config.{field} is empty: name the folder exported by the {stage} stage, that of a"
            " published model, or 'random' for untrained weights"
        )
    if folder != "random" and not paths.as_path(folder).is_dir():
        raise UserError(
            f"config.{field} is {folder!r}, which is no folder: run the {stage} stage and"
            " launch.export first, or name the folder of a published model"
        )
    name = part if experiment.task == "flamingo" else ""
    return PretrainedPart(name, folder, config, field, EXPORT_PATHS[part])


def _of_flamingo(
    experiment: Experiment, part: str, config: Any, path: ExportPath
) -> PretrainedPart:
    """Finds a part in the Flamingo that training continues from, `config.flamingo_from`."""
    folder = experiment.flamingo_from
    if experiment.vision_encoder_from or experiment.language_model_from:
        raise UserError(
            "config.flamingo_from brings the encoder and the language model along: set"
            " config.vision_encoder_from and language_model_from to ''"
        )
    if folder != "random" and not paths.as_path(folder).is_dir():
        raise UserError(
            f"config.flamingo_from is {folder!r}, which is no folder: run the flamingo stage"
            " and launch.export first"
        )
    return PretrainedPart(part, folder, config, "flamingo_from", {"flamingo": path})
