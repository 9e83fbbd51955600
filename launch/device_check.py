"""The device check of `launch.benchmark device`: sizes from the configs, and one process for each
section.
"""

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from configs import benchmark, flamingo_3b
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.planning.device_check.sections import (
    SECTIONS,
    Section,
    make_folder,
    run_sections,
)
from flamingo_jax.planning.device_check.sections import (
    SUMMARY as SUMMARY,
)

if TYPE_CHECKING:
    from flamingo_jax.planning.device_check.sizes import DeviceCheckSize

SIZES = ("full", "tiny")
TINY = (
    "layers=1,width=32,heads=2,vocab=64,xattn_every=1,vit_layers=1,vit_width=32,vit_heads=2,"
    "image=32,patch=16,interleaved=2x2x16,pairs=2x1x8"
)
"""The model whose step is timed at the tiny size; full is Flamingo-3B."""
RESUMED = (
    "layers=4,width=512,heads=8,vocab=8192,xattn_every=2,vit_layers=4,vit_width=512,vit_heads=8,"
    "image=224,patch=14,interleaved=16x3x128,pairs=16x1x32"
)
"""The model that is stopped and resumed on a device."""


def check_size(name: str) -> "DeviceCheckSize":
    """Makes the size of a name in `SIZES`."""
    from flamingo_jax.planning.device_check.sizes import full_size, tiny_size

    if name == "tiny":
        made = benchmark.experiment_of(TINY)
        assert made.flamingo is not None
        # One layer, so that it compiles in a second.
        resampler = dataclasses.replace(made.flamingo.resampler, layers=1)
        flamingo = dataclasses.replace(made.flamingo, resampler=resampler)
        tiny = _on_all_devices(dataclasses.replace(made, flamingo=flamingo), "float32")
        return tiny_size(tiny, tiny)
    resumed = _on_all_devices(benchmark.experiment_of(RESUMED), "bfloat16")
    return full_size(_on_all_devices(flamingo_3b.experiment(), "bfloat16"), resumed)


def _on_all_devices(experiment: Experiment, compute_dtype: Any) -> Experiment:
    training = dataclasses.replace(experiment.training, compute_dtype=compute_dtype)
    return dataclasses.replace(experiment, training=training, mesh=MeshConfig())


def run(output: str, minutes: float, size: str, section: str, on_end: Any) -> bool:
    """Runs the check, or one of its sections in this process, and returns whether all passed.

    Args:
      section: the only one to run, for `minutes`; "" for all of them.
      on_end: called with each section's name and results.

    Raises: UserError without an output folder, or where a section found something wrong.
    """
    if not output:
        raise UserError("--output is not set: name the folder for the results")
    folder = pathlib.Path(output)
    if section:
        from flamingo_jax.planning.device_check.check import run_section

        make_folder(folder)
        run_section(section, check_size(size), folder, 60 * minutes)
        return True

    def command(section: Section, seconds: float) -> list[str]:
        return [
            *(sys.executable, "-m", "launch.benchmark", "device", f"--output={folder}"),
            *(f"--size={size}", f"--section={section.name}", f"--minutes={seconds / 60}"),
        ]

    return bool(run_sections(folder, minutes, command, SECTIONS, on_end)["passed"])
