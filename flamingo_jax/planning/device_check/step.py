"""Times the training step of a Flamingo on this device: with several numbers of microbatches, fed
with decoded photos, part by part, and where its time goes by the profiler's trace.
"""

import concurrent.futures
import dataclasses
import gc
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.planning.device_check.photos import PhotoBatches, cores, make_photos
from flamingo_jax.planning.device_check.sections import Budget, CheckFailed, Results
from flamingo_jax.planning.device_check.sizes import DeviceCheckSize
from flamingo_jax.planning.device_check.trace import top_operations
from flamingo_jax.planning.timing import RunningStep, matrix_rate
from flamingo_jax.tasks.flops import peak_flops
from flamingo_jax.training.prefetcher import Prefetcher

TOP = 15
"""Operations of the trace that are listed."""
MEASURED_SHARE = 0.4
"""The share of what is left of the section's time that further microbatch sizes may take; the
rest is for photos, the trace and the parts.
"""


def check_step(size: DeviceCheckSize, results: Results, budget: Budget) -> None:
    """Measures the step's time and its share of the matrix rate of the same run (MFU).

    Raises: CheckFailed where no number of microbatches fits the memory, or a loss is not finite.
    """
    device = jax.devices()[0]
    dtype = jnp.dtype(size.train.training.compute_dtype)
    mesh_size = make_mesh(size.train.mesh).size
    rate = matrix_rate(dtype, size.steps) * mesh_size
    published = (peak_flops(device.device_kind) or 0.0) * mesh_size
    results.put("device", f"{mesh_size} x {device.device_kind}")
    results.put("matrix_rate", rate)
    results.put("published_rate", published or None)
    found: dict[int, dict[str, Any]] = {}
    for microbatches in size.microbatches:
        slowest = max((one["all_seconds"] for one in found.values()), default=0.0)
        if found and slowest > MEASURED_SHARE * budget.left:
            break
        began = time.monotonic()
        made = _measure(in_parts(size.train, microbatches), size, budget, rate)
        found[microbatches] = made | {"all_seconds": time.monotonic() - began}
        results.put("microbatches", {str(number): one for number, one in found.items()})
        gc.collect()
    timed = {number: one for number, one in found.items() if "mfu" in one}
    if not timed:
        raise CheckFailed("the step fits the device's memory with none of the microbatch sizes")
    best = max(timed, key=lambda number: timed[number]["mfu"])
    results.put("best_microbatches", best)
    results.put("mfu", timed[best]["mfu"])
    _look_closely(in_parts(size.train, best), size, results, budget)


def in_parts(experiment: Experiment, microbatches: int) -> Experiment:
    """Returns the experiment with so many microbatches of every dataset, random frozen parts,
    and the mesh of all devices here.
    """
    data = {
        name: dataclasses.replace(dataset, microbatches=microbatches)
        for name, dataset in experiment.data.items()
    }
    return dataclasses.replace(
        experiment,
        data=data,
        held_out={},
        vision_encoder_from="random",
        language_model_from="random",
        flamingo_from="",
    )


def _measure(
    experiment: Experiment, size: DeviceCheckSize, budget: Budget, rate: float
) -> dict[str, Any]:
    """Times the step of one number of microbatches; what does not fit is told, not raised."""
    mesh = make_mesh(experiment.mesh)
    try:
        with jax.set_mesh(mesh):
            step = RunningStep(experiment, mesh)
            loss = float(jax.block_until_ready(step())["loss"])
            seconds = _median(step, size.steps, budget)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"does_not_fit": str(error).splitlines()[0][:200]}
    if not jnp.isfinite(loss):
        raise CheckFailed(f"the loss of a step is {loss}")
    work = step.work()
    return {
        "step_seconds": seconds,
        "mfu": step.flops() / seconds / rate,
        "flops": step.flops(),
        "tokens_per_second": work.tokens / seconds,
        "images_per_second": work.frames / seconds,
        "compile_seconds": step.compile_seconds,
        "peak_bytes": peak_bytes(),
    }


def _median(run: Callable[[], Any], steps: int, budget: Budget) -> float:
    """Returns the median time of up to `steps` runs, at least two, while time is left."""
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < steps and budget.left > 3 * max(taken)):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def peak_bytes() -> int | None:
    """Returns the peak of the first device's memory since the process began; None where the
    device does not say.
    """
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _look_closely(
    experiment: Experiment, size: DeviceCheckSize, results: Results, budget: Budget
) -> None:
    """Runs the best form again: on photos, under the profiler, and part by part."""
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        step = RunningStep(experiment, mesh)
        jax.block_until_ready(step())
        if budget.left > 0:
            results.put("photos", _on_photos(step, size, mesh, budget))
        if budget.left > 0:
            folder = results.folder / "trace"
            with jax.profiler.trace(str(folder)):
                jax.block_until_ready(step())
            results.put("trace", top_operations(pathlib.Path(folder), TOP))
        if budget.left > 0:
            results.put("parts", step.time_parts(2))


def _on_photos(
    step: RunningStep, size: DeviceCheckSize, mesh: jax.sharding.Mesh, budget: Budget
) -> dict[str, Any]:
    """Times steps whose images are decoded meanwhile, as in training from a folder of JPEGs."""
    photos = make_photos(size.photos, size.photo)
    with concurrent.futures.ThreadPoolExecutor(cores()) as pool:
        iterators = {name: PhotoBatches(batch, photos, pool) for name, batch in step.made.items()}
        prefetcher = Prefetcher(iterators, mesh)
        try:
            # The first batches are decoded while no step runs.
            jax.block_until_ready(step(next(prefetcher).batches))
            waited, began = prefetcher.seconds_waiting, time.perf_counter()
            count = 0
            while count < 2 or (count < size.steps and budget.left > 0):
                metrics = jax.block_until_ready(step(next(prefetcher).batches))
                count += 1
            seconds = time.perf_counter() - began
            waited = prefetcher.seconds_waiting - waited
        finally:
            prefetcher.close()
    loss = float(metrics["loss"])
    if not jnp.isfinite(loss):
        raise CheckFailed(f"the loss of a step on photos is {loss}")
    return {
        "step_seconds": seconds / count,
        "waiting_share": waited / seconds,
        "images_per_second": step.work().frames * count / seconds,
        "loss": loss,
    }
