"""Describes a run for the model card of its export."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.model_card import (
    LOAD_FLAMINGO,
    LOAD_PART,
    ModelCard,
    describe_part,
    render,
)
from flamingo_jax.experiment import Experiment
from flamingo_jax.json_lines import read_lines
from flamingo_jax.tasks import stages
from flamingo_jax.training import held_out
from flamingo_jax.training.setup import TrainSetup
from flamingo_jax.weight_parts import is_multiplied

TITLES = {
    "contrastive": "Vision encoder and text encoder, trained contrastively",
    "language_modelling": "Language model",
    "flamingo": "Flamingo",
}
LOADED_AS = {"contrastive": "vision_encoder", "language_modelling": "language_model"}
"""{task: the part that its export is loaded as}."""
REPORT = "report.json"


def run_card(
    experiment: Experiment,
    setup: TrainSetup,
    workdir: pathlib.Path,
    step: int,
    pretrained: Mapping[str, Mapping[str, str]],
    *,
    trained_only: bool = False,
) -> str:
    """Writes the model card of a run's export.

    pretrained: {frozen part: its folder and digest}, as the checkpoint of `step` names them.
    """
    task = experiment.task
    parts = [
        describe_part(
            name or "language_model", part["folder"], part["digest"], included=not trained_only
        )
        for name, part in pretrained.items()
        if part["folder"] != "random"
    ]
    parts += [
        describe_part(part.name or "flamingo", part.folder)
        for part in stages.warm_started_parts(experiment)
        if part.folder != "random"
    ]
    if task == "flamingo":
        moved, flags = "", ""
        if trained_only:
            moved = ', parts={"language_model": FOLDER, "vision_encoder": FOLDER}'
            flags = " --parts=language_model=FOLDER --parts=vision_encoder=FOLDER"
        loading = LOAD_FLAMINGO.format(parts=moved, flags=flags)
        if trained_only:
            loading += (
                "\nThe folders need to be named only where the parts are elsewhere than listed"
                " above; their digests must be the same.\n"
            )
    else:
        loading = LOAD_PART.format(part=LOADED_AS[task])
    return render(
        ModelCard(
            experiment.name or TITLES[task],
            _summary(experiment, trained_only),
            parameters=_parameters(experiment, setup),
            parts=parts,
            training=_training(experiment, setup, step),
            data=[
                {
                    "dataset": name,
                    "kind": data.kind,
                    "folder": data.path,
                    "rows a step": f"{data.batch_size:,}",
                    "tokens a row": f"{data.max_length:,}",
                    "weight of its loss": f"{data.weight:g}",
                }
                for name, data in experiment.data.items()
            ],
            figures=_figures(experiment, workdir, step),
            loading=loading,
            front_matter={"pipeline_tag": "image-text-to-text"} if task == "flamingo" else {},
        )
    )


def _summary(experiment: Experiment, trained_only: bool) -> str:
    """Says in a sentence what the model is."""
    what = {
        "contrastive": "A vision encoder and a text encoder, trained so that images and their"
        " texts have similar embeddings.",
        "language_modelling": "A language model.",
        "flamingo": "A Flamingo ([Alayrac et al. 2022](https://arxiv.org/abs/2204.14198)): a"
        " vision encoder and a language model, with a resampler and gated cross-attention trained"
        " between them.",
    }[experiment.task]
    if trained_only:
        what += (
            " This folder holds what was trained; the frozen parts are read from their own folders."
        )
    return what


def _parameters(experiment: Experiment, setup: TrainSetup) -> dict[str, int]:
    """Counts the model's parameters by part, trained and frozen ones apart."""
    found: dict[str, int] = {}
    for trained, parameters in ((True, setup.trainable), (False, setup.frozen)):
        for name, like in parameters.items():
            # Scales of int8 weights are no parameters of the model.
            if not is_multiplied(name):
                continue
            part = (
                "language_model" if experiment.task == "language_modelling" else name.split("/")[0]
            )
            what = f"{part.replace('_', ' ')}, {'trained' if trained else 'frozen'}"
            found[what] = found.get(what, 0) + math.prod(like.shape)
    return found


def _training(experiment: Experiment, setup: TrainSetup, step: int) -> dict[str, str]:
    """Describes how a run was trained."""
    optimizer, training = experiment.optimizer, experiment.training
    rows = sum(data.batch_size for data in experiment.data.values())
    tokens = sum(data.batch_size * data.max_length for data in experiment.data.values())
    found = {
        "stage": experiment.task.replace("_", " "),
        "exported step": f"{step:,} of {training.steps:,}",
        "batch": f"{rows:,} rows of {tokens:,} tokens a step, padding included",
        "optimizer": f"AdamW, learning rate {optimizer.learning_rate:g} ({optimizer.schedule},"
        f" {optimizer.warmup_steps:,} steps of warm-up), weight decay"
        f" {optimizer.weight_decay:g}, gradients clipped at norm {optimizer.clip_norm:g}",
        "computed in": training.compute_dtype,
        "seed": str(experiment.seed),
    }
    if training.lora.rank:
        found["low-rank updates"] = (
            f"rank {training.lora.rank}, alpha {training.lora.alpha:g}, of"
            f" {', '.join(training.lora.targets)}"
        )
    if experiment.task == "flamingo" and not training.use_visuals:
        found["images"] = "left out, as a baseline"
    return found


def _figures(experiment: Experiment, workdir: pathlib.Path, step: int) -> dict[str, float]:
    """Collects what was measured: the newest values of the run's evaluators up to the exported
    step, and the report of `launch.evaluate` in the workdir, if there is one.
    """
    names = {held_out.NAME, *experiment.evaluators}
    found: dict[str, float] = {}
    for line in read_lines(workdir / "metrics.jsonl"):
        if line.get("step", 0) <= step:
            found |= {
                key: value
                for key, value in line.items()
                if key.split("/")[0] in names and isinstance(value, (int, float))
            }
    try:
        report = json.loads(manifest.retry_read((workdir / REPORT).read_bytes))
        for benchmark, shots in report["benchmarks"].items():
            for count, metrics in shots.items():
                found |= {
                    f"{benchmark}, {count} shots, {metric} (launch.evaluate)": float(value)
                    for metric, value in metrics.items()
                    if _is_number(value)
                }
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError):
        # There is no report, or one of another suite.
        pass
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
