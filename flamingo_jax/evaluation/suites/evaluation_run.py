"""One call of `launch.evaluate`: the models, how they are asked, and where the report goes."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from flamingo_jax.configuring import from_json
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.protocol.benchmark import (
    EvaluationSettings,
)
from flamingo_jax.experiment import Experiment, FlamingoConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import flamingo_config, load_flamingo
from flamingo_jax.json_lines import read_lines
from flamingo_jax.paths import as_path
from flamingo_jax.progress import TOTAL_SECONDS

MODEL, BASELINE = "model", "without_images"
"""Their names in reports."""


@dataclasses.dataclass(frozen=True)
class EvaluationRun:
    """One call of `launch.evaluate`: the models, the settings and the output folder.

    model: an exported folder.
    baseline: the exported folder of a model trained without images, which gets the same
      prompts with every image removed; "" for none.
    output: the folder that the report is written to.
    batch_size: the most prompts in a batch.
    mesh: the devices of both models; None for the default device.
    frozen_dtype: of both models' frozen parts; None for their exports' own.
    parts: {part: folder} of frozen parts that the model's export names, see `fj.load`.
    seconds: {stage: wall seconds of training}, for the report.
    curves: {stage: lines of its metrics.jsonl}, for the report.
    began: time.monotonic() at the start.
    """

    model: str
    output: pathlib.Path
    settings: EvaluationSettings
    baseline: str = ""
    batch_size: int = 64
    mesh: Mesh | None = None
    frozen_dtype: str | None = None
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    began: float = dataclasses.field(default_factory=time.monotonic)

    def config(self) -> FlamingoConfig:
        """Reads the model's config, and checks the baseline's, so that a wrong folder is
        reported before any work.
        """
        if self.baseline:
            flamingo_config(self.baseline)
        return flamingo_config(self.model)

    def load(self) -> tuple[dict[str, Engine], dict[str, Any]]:
        """Loads the weights of both models.

        Returns: ({name: engine}, fields of report.json that identify the models and settings).
        """
        options: Any = {"mesh": self.mesh, "frozen_dtype": self.frozen_dtype}
        loaded = {MODEL: load_flamingo(self.model, parts=self.parts, **options)}
        if self.baseline:
            loaded[BASELINE] = load_flamingo(self.baseline, **options)
        engines = {
            name: Engine(one, with_visuals=name == MODEL, batch_size=self.batch_size)
            for name, one in loaded.items()
        }
        about = {
            "metrics_are": "fractions between 0 and 1",
            "model": {"folder": self.model, "digest": loaded[MODEL].digest},
            "baseline": (
                {"folder": self.baseline, "digest": loaded[BASELINE].digest}
                if self.baseline
                else None
            ),
            "settings": dataclasses.asdict(self.settings),
            "frozen_dtype": self.frozen_dtype,
        }
        return engines, about

    def all_seconds(self) -> dict[str, float]:
        """Returns the wall seconds by stage, with the evaluation's own as a stage and in the
        total, if there is one.
        """
        own = time.monotonic() - self.began
        total = (
            {TOTAL_SECONDS: self.seconds[TOTAL_SECONDS] + own}
            if TOTAL_SECONDS in self.seconds
            else {}
        )
        stages = {name: value for name, value in self.seconds.items() if name != TOTAL_SECONDS}
        return stages | {"evaluation": own} | total

    def all_curves(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the training metrics by stage, with those stored in the two exports."""
        own = {"flamingo": self.model} | (
            {"without images": self.baseline} if self.baseline else {}
        )
        return dict(self.curves) | {
            name: read_lines(as_path(folder) / "metrics.jsonl") for name, folder in own.items()
        }


def trained_prompts(model: str) -> list[str]:
    """Lists the distinct question prompts that a model was trained with, from the
    experiment.json in its export; [] where it has none.
    """
    file = as_path(model) / "experiment.json"
    if not file.is_file():
        return []
    experiment = from_json(Experiment, read_json(file))
    return sorted(
        {dataset.prompt for dataset in experiment.data.values() if dataset.kind == "questions"}
    )


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON file; raises UserError where it is missing or not valid JSON."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): write it again") from error
