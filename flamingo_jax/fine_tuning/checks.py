"""What is checked of all cells before the first one trains."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from flamingo_jax import configuring
from flamingo_jax.checkpointing.export import open_export
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.datasets import DatasetReader
from flamingo_jax.experiment import DatasetConfig, Experiment, FlamingoConfig, VisionConfig
from flamingo_jax.fine_tuning.grid import Cell
from flamingo_jax.interop.weight_sources import open_source
from flamingo_jax.models.nfnet import variant_of
from flamingo_jax.partitioning.mesh import check_batches
from flamingo_jax.tasks import stages
from flamingo_jax.training.optimizer import make_schedule

KINDS = {
    "vqa_accuracy": ("questions",),
    "exact_match": ("questions",),
    "cider": ("pairs", "videos"),
    "accuracy": ("questions", "pairs", "videos"),
    "roc_auc": ("questions", "pairs", "videos"),
}
"""{metric: kinds of datasets that it scores}."""


def of_model(experiment: Experiment, model: str) -> Experiment:
    """Makes an experiment go on from an exported Flamingo: with its config and tokenizer.

    Raises: UserError where the folder is no such export.
    """
    export = open_export(model)
    if export.kind != "flamingo" or export.tokenizer_file is None:
        raise UserError(
            f"{model} holds a {export.kind} export, but fine-tuning goes on from a Flamingo with"
            " its tokenizer: name the folder exported from its Flamingo stage"
        )
    return dataclasses.replace(
        experiment,
        flamingo=configuring.from_json(FlamingoConfig, export.config),
        tokenizer=str(export.tokenizer_file),
        flamingo_from=model,
        vision_encoder_from="",
        language_model_from="",
    )


def of_dataset(experiment: Experiment, path: str) -> Experiment:
    """Makes an experiment train on another folder's dataset, and measure held-out losses there.

    Raises: UserError where it has several datasets.
    """
    name, _ = task_dataset(experiment)

    def there(datasets: dict[str, DatasetConfig]) -> dict[str, DatasetConfig]:
        return {
            key: dataclasses.replace(each, path=path) if key == name else each
            for key, each in datasets.items()
        }

    return dataclasses.replace(
        experiment, data=there(experiment.data), held_out=there(experiment.held_out)
    )


def task_dataset(experiment: Experiment) -> tuple[str, DatasetConfig]:
    """Returns the name and config of the dataset that is fine-tuned on.

    Raises: UserError where there is not just one.
    """
    if len(experiment.data) != 1:
        raise UserError(
            f"config.data has {len(experiment.data)} datasets, but fine-tuning trains and scores"
            " one task: leave one"
        )
    return next(iter(experiment.data.items()))


def check_cells(cells: Sequence[Cell], datasets: DatasetReader, mesh: Mesh) -> None:
    """Checks that every cell can be trained and scored.

    Raises: UserError for a split that is missing or empty, an image size that the encoder or
      resampler cannot take, batches that do not divide, or a model that is not the config's.
    """
    seen: set[tuple[str, str]] = set()
    for cell in cells:
        experiment = cell.experiment
        if experiment.task != "flamingo" or not experiment.flamingo_from:
            raise UserError(
                "fine-tuning goes on from a trained Flamingo: name its export with --model or"
                " config.flamingo_from"
            )
        _check_data(experiment, datasets, seen)
        _check_frozen(experiment)
        check_batches(experiment, mesh)
        make_schedule(experiment.optimizer, experiment.training.steps)
        for part in (*stages.frozen_parts(experiment), *stages.warm_started_parts(experiment)):
            open_source(part)
        _check_image_size(experiment)


def _check_data(
    experiment: Experiment, datasets: DatasetReader, seen: set[tuple[str, str]]
) -> None:
    """Opens the splits that are trained and scored on; `seen` has those that were opened."""
    _, dataset = task_dataset(experiment)
    scoring = experiment.fine_tuning
    if dataset.kind not in KINDS[scoring.metric]:
        raise UserError(
            f"config.fine_tuning.metric is {scoring.metric!r}, which scores"
            f" {' or '.join(KINDS[scoring.metric])}, but the dataset is of kind {dataset.kind!r}:"
            " choose another metric"
        )
    if scoring.metric == "roc_auc" and len(scoring.classes) != 2:
        raise UserError(
            f"config.fine_tuning.classes has {len(scoring.classes)} names, but roc_auc needs two,"
            " such as ('no', 'yes'), whose second is the positive one"
        )
    for split in (dataset.split, scoring.validation_split, scoring.test_split):
        if split and (dataset.path, split) not in seen:
            seen.add((dataset.path, split))
            if not len(datasets.records(dataset.path, split, dataset.kind)):
                raise UserError(
                    f"the split {split!r} of {dataset.path} is empty: name another one, or build"
                    " the dataset from more records"
                )


def _check_frozen(experiment: Experiment) -> None:
    """Raises UserError where cached features would hide what a cell varies."""
    if not experiment.training.cache_features:
        return
    _, dataset = task_dataset(experiment)
    varied = {
        "training.unfreeze_vision_encoder": experiment.training.unfreeze_vision_encoder,
        "the dataset's flip": dataset.flip,
        "the dataset's colour": dataset.colour > 0,
    }
    for what in (what for what, given in varied.items() if given):
        raise UserError(
            f"config.training.cache_features keeps the features of plain images, but {what} is on:"
            " turn one of them off"
        )


def _check_image_size(experiment: Experiment) -> None:
    """Raises UserError for an image size, other than the export's own, that the encoder does not
    divide into whole cells or the resampler has no weights for.
    """
    flamingo = experiment.flamingo
    assert flamingo is not None
    size, before = flamingo.vision.image_size, _trained_size(experiment.flamingo_from)
    if size == before:
        return
    side = cell_side(flamingo.vision)
    if size % side:
        near = max(round(size / side), 1) * side
        raise UserError(
            f"an image size of {size} does not divide into the encoder's cells of {side} pixels:"
            f" make it a multiple, such as {near}"
        )
    if flamingo.resampler.kind == "mlp":
        raise UserError(
            f"an mlp resampler has a weight for each cell of {before} pixels, and none for"
            f" {size}: leave the image size, or take a model with another resampler"
        )


def cell_side(vision: VisionConfig) -> int:
    """Returns the side in pixels of a patch of a ViT, or of a grid cell of an NFNet."""
    return vision.vit.patch_size if vision.vit else variant_of(vision).stride


def _trained_size(model: str) -> int:
    """Returns the image size of an exported Flamingo."""
    return configuring.from_json(FlamingoConfig, open_export(model).config).vision.image_size


def require_same_cell(folder: pathlib.Path, saved: Experiment, now: Experiment) -> None:
    """Raises UserError where the cell in a folder was trained with another config."""
    before, after = _meaning(saved), _meaning(now)
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            raise UserError(
                f"{folder} was trained with {key} = {before.get(key)!r}, but it is"
                f" {after.get(key)!r} now: name another --output, or set it back"
            )


def _meaning(experiment: Experiment) -> dict[str, Any]:
    """Returns the config keys that a cell's results depend on, with their values."""
    flat = configuring.flatten(configuring.to_json(experiment))
    return {key: value for key, value in flat.items() if key.split(".")[1] not in _FREE}


_FREE = ("name", "mesh", "trackers", "tracker_project")
"""Config keys that may change between the starts of a cell."""
