"""The sections of the device check by name, and how one of them is run."""

import pathlib
from collections.abc import Callable

import jax

from flamingo_jax.errors import UserError
from flamingo_jax.planning.device_check.attention import check_attention
from flamingo_jax.planning.device_check.generation import check_generation
from flamingo_jax.planning.device_check.photos import check_images
from flamingo_jax.planning.device_check.resume import check_resume
from flamingo_jax.planning.device_check.sections import Budget, CheckFailed, Results
from flamingo_jax.planning.device_check.sizes import DeviceCheckSize
from flamingo_jax.planning.device_check.step import check_step

CHECKS: dict[str, Callable[[DeviceCheckSize, Results, Budget], None]] = {
    "attention": check_attention,
    "step": check_step,
    "generation": check_generation,
    "resume": check_resume,
    "images": check_images,
}


def run_section(name: str, size: DeviceCheckSize, folder: pathlib.Path, seconds: float) -> None:
    """Runs one section in this process; its results are in `<folder>/<name>.json` as they come.

    Raises: UserError where it found something wrong, or jax has no accelerator for the full size.
    """
    if size.needs_accelerator and name != "images" and jax.default_backend() == "cpu":
        raise UserError(
            "jax finds no GPU or TPU here: install the jax of this machine's accelerator, such as"
            " jax[cuda12] or jax[tpu], or take --size=tiny"
        )
    results = Results(folder, name)
    results.put("size", size.train.name)
    try:
        CHECKS[name](size, results, Budget(seconds))
    except CheckFailed as error:
        raise UserError(f"{name}: {error}") from error
