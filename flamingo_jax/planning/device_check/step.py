"""Times the training step of a Flamingo on this device: with several numbers of microbatches, fed
with decoded photos, part by part, and where its time goes by the profiler's trace.
"""

import concurrent.futures
import dataclasses
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

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
RATE_STEPS = 10
"""Matrix products that are timed."""


def check_step(size: DeviceCheckSize, results: Results, budget: Budget) -> None:
    """Measures the step's time and its share of the matrix rate of the same run (MFU).

    The first number of microbatches that fits is looked at closely: on photos, by the profiler and
    part by part. Further numbers are timed as long as time is left.

    Raises: CheckFailed where no number of microbatches fits the memory, or a loss is not finite.
    """
    device = jax.devices()[0]
    dtype = jnp.dtype(size.train.training.compute_dtype)
    devices = make_mesh(size.train.mesh).size
    rate = matrix_rate(dtype, RATE_STEPS) * devices
    published = (peak_flops(device.device_kind) or 0.0) * devices
    results.put("device", f"{devices} x {device.device_kind}")
    results.put("matrix_rate", rate)
    results.put("published_rate", published or None)
    timed: dict[int, dict[str, Any]] = {}
    slowest = 0.0
    for microbatches in size.microbatches:
        if timed and slowest > budget.left:
            break
        began = time.monotonic()
        experiment = in_parts(size.train, microbatches)
        try:
            found = _measure(experiment, size, results, budget, rate, closely=not timed)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # Told, since the next number may fit.
            results.put(f"{microbatches}_microbatches", f"no room: {str(error)[:200]}")
            continue
        finally:
            gc.collect()
        slowest = max(slowest, time.monotonic() - began)
        timed[microbatches] = found
        results.put(f"{microbatches}_microbatches", found)
        best = max(timed, key=lambda number: timed[number]["mfu"])
        results.put("best_microbatches", best)
        results.put("mfu", timed[best]["mfu"])
    if not timed:
        raise CheckFailed("the step fits the device's memory with none of the microbatch sizes")
    if "closer_look" in results:
        raise CheckFailed("the step was timed, but the closer look at it broke off")


def experiment_parts(experiment: Experiment) -> int:
    """Returns the number of microbatches, which all datasets share."""
    return next(iter(experiment.data.values())).microbatches


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
    experiment: Experiment,
    size: DeviceCheckSize,
    results: Results,
    budget: Budget,
    rate: float,
    *,
    closely: bool,
) -> dict[str, Any]:
    """Times the step of one number of microbatches.

    closely: also on photos, under the profiler, and part by part, as results of their own.
    """
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        step = RunningStep(experiment, mesh)
        loss = float(jax.block_until_ready(step())["loss"])
        if not math.isfinite(loss):
            raise CheckFailed(f"the loss of a step is {loss}")
        seconds = _median(step, size.steps, budget)
        work, flops = step.work(), step.flops()
        found = {
            "mfu": flops / seconds / rate,
            "step_seconds": seconds,
            "flops": flops,
            "tokens_per_second": work.tokens / seconds,
            "images_per_second": work.frames / seconds,
            "compile_seconds": step.compile_seconds,
            # Of the process: the first number is the one that it belongs to.
            **({"peak_bytes": peak_bytes()} if closely else {}),
        }
        if closely:
            results.put(f"{experiment_parts(experiment)}_microbatches", found)
            results.put("mfu", found["mfu"])
            try:
                _look_closely(step, size, mesh, results, budget)
            except RuntimeError as error:
                # The step itself was timed: a profiler that fails, or no room for a part.
                results.put("closer_look", f"broke off: {str(error)[:200]}")
    return found


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
    step: RunningStep, size: DeviceCheckSize, mesh: Mesh, results: Results, budget: Budget
) -> None:
    """Runs the step on photos, under the profiler, and part by part."""
    if budget.left > 0:
        results.put("photos", _on_photos(step, size, mesh, budget))
    if budget.left > 0:
        folder = results.folder / "trace"
        with jax.profiler.trace(str(folder)):
            jax.block_until_ready(step())
        results.put("trace", top_operations(folder, TOP))
    if budget.left > 0:
        results.put("parts_seconds", step.time_parts(2))


def _on_photos(
    step: RunningStep, size: DeviceCheckSize, mesh: Mesh, budget: Budget
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
    if not math.isfinite(loss):
        raise CheckFailed(f"the loss of a step on photos is {loss}")
    return {
        "step_seconds": seconds / count,
        "waiting_share": waited / seconds,
        "images_per_second": step.work().frames * count / seconds,
        "loss": loss,
    }
