"""Times the export of a run that is made for it: without training, by the code that writes
exports and checkpoints, with values that do not compress.
"""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax import paths
from flamingo_jax.checkpointing import manifest
from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.checkpointing.export import export_model, open_export
from flamingo_jax.checkpointing.shard_writer import RECORD
from flamingo_jax.checkpointing.stored_arrays import PARAMETERS
from flamingo_jax.checkpointing.streaming import HashingReader, StreamedTensor, TensorStream
from flamingo_jax.configuring import to_json
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment, MeshConfig
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.processing.tokenizer import FILE_NAME
from flamingo_jax.pytrees import leaf_name, stack_axes
from flamingo_jax.tasks import stages
from flamingo_jax.training.setup import make_setup

BLOCK = 4 << 20
"""Random values that are repeated: farther apart than the compressor of checkpoints looks."""
CHUNK = 16 << 20
"""Bytes of each read of the bare copy."""
SECONDS = 1800
"""How long a child may take."""
_CHILD = """
import json, pathlib, sys, time
from flamingo_jax.training.exporting import export_run
workdir, output = map(pathlib.Path, sys.argv[1:])
def memory(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next((int(l.split()[1]) << 10 for l in lines if l.startswith(name + ":")), 0)
before, began = memory("VmRSS"), time.monotonic()
export_run(workdir, output)
print(json.dumps({"seconds": time.monotonic() - began, "grown": memory("VmHWM") - before}))
"""


class ExportTiming(NamedTuple):
    """Holds what was measured.

    bytes: of the exported tensors. largest: of the largest of them, a layer each. copy: seconds
    of a bare copy of the files that hold them, to new files that are flushed. seconds: of the
    export. grown: bytes by which the process of the export grew at most. kept: files of the
    killed export that were kept, of `files`. resumed: seconds of the start that continued it.
    equal: whether its files are those of the export in one go.
    """

    bytes: int
    largest: int
    copy: float
    seconds: float
    grown: int
    kept: int
    files: int
    resumed: float
    equal: bool

    @property
    def share(self) -> float:
        """The rate of the export, relative to the bare copy's."""
        return self.copy / self.seconds


def time_export(experiment: Experiment, folder: pathlib.Path) -> ExportTiming:
    """Makes a run of this experiment in a new folder, and exports it in processes of their own:
    once in one go, and once killed after half of its files. Removes the folder.

    Raises: UserError where the folder exists, or a process fails.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: name a folder that is made and removed")
    try:
        make_run(experiment, folder)
        sources = _source_files(folder)
        copy = _time_copy(sources, folder / "copy")
        whole = _export(folder, folder / "whole", sources)
        export = open_export(folder / "whole")
        tensors = [entry.bytes for name, entry in export.files.items() if _is_weights(name)]
        kept = _kill_halfway(folder, folder / "again", sources, len(tensors))
        resumed = _export(folder, folder / "again", sources)
        sizes = [
            math.prod(shape[stack_axes(name) :]) * export.dtypes[name].itemsize
            for name, shape in export.shapes.items()
        ]
        return ExportTiming(
            sum(math.prod(s) * export.dtypes[n].itemsize for n, s in export.shapes.items()),
            max(sizes),
            copy,
            whole["seconds"],
            int(whole["grown"]),
            kept,
            len(tensors),
            resumed["seconds"],
            open_export(folder / "again").digest == export.digest,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_run(experiment: Experiment, folder: pathlib.Path) -> Experiment:
    """Writes the exports of the frozen parts and the run's workdir, `folder/run`, with one
    checkpoint; returns the experiment that it says it is of.
    """
    mesh = make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])
    config = experiment.flamingo
    assert config is not None
    setup = make_setup(experiment, mesh)
    folder.mkdir(parents=True)
    pretrained = {}
    for part in stages.PARTS:
        stage = "vision_encoder" if part == "vision_encoder" else "language_model"
        kept = {
            name.removeprefix(f"{part}/"): like
            for name, like in setup.frozen.items()
            if name.startswith(f"{part}/")
        }
        export_model(
            folder / part,
            kind=stage,
            config=to_json(getattr(config, stages.FLAMINGO_PATHS[part].config)),
            parameters=TensorStream(list(_random_tensors(kept))),
        )
        digest = open_export(folder / part).digest
        pretrained[part] = {"folder": str(folder / part), "digest": digest}
    experiment = dataclasses.replace(
        experiment,
        vision_encoder_from=str(folder / "vision_encoder"),
        language_model_from=str(folder / "language_model"),
    )
    (folder / "run").mkdir()
    (folder / "run" / FILE_NAME).write_bytes(b"not read")
    write_run(experiment, folder / "run", pretrained)
    return experiment


def write_run(
    experiment: Experiment, workdir: pathlib.Path, pretrained: Mapping[str, Mapping[str, str]]
) -> None:
    """Writes config and checkpoint of a run that ended with random parameters into a workdir
    that holds its tokenizer. pretrained: {frozen part: its folder and digest}.
    """
    setup = make_setup(experiment, make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1]))
    (workdir / "metrics.jsonl").write_text("")
    (workdir / "config.json").write_text(json.dumps(to_json(experiment)))
    state = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), setup.state)
    rng = np.random.default_rng(0)
    block = rng.standard_normal(BLOCK // 4, np.float32)
    trainable = {
        name: jnp.asarray(np.resize(block, like.shape)) for name, like in setup.trainable.items()
    }
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=1)
    extra = {"pretrained": pretrained, "experiment": to_json(experiment)}
    checkpoints.save(experiment.training.steps, state._replace(trainable=trainable), extra)
    checkpoints.close()


def _random_tensors(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[StreamedTensor]:
    """Describes tensors of random values, layer by layer."""
    block = np.random.default_rng(1).standard_normal(BLOCK // 4, np.float32)
    for name, like in shapes.items():
        axes, dtype = stack_axes(name), np.dtype(like.dtype)
        values = block.astype(dtype)
        shape = tuple(like.shape[axes:])
        size = math.prod(shape)

        def pieces(
            reader: HashingReader, values: np.ndarray = values, size: int = size
        ) -> Iterator[np.ndarray]:
            for start in range(0, size, values.size):
                yield values[: min(values.size, size - start)]

        for index in np.ndindex(*like.shape[:axes]):
            yield StreamedTensor(leaf_name(name, index), dtype, shape, pieces, values.nbytes)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _source_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists the files that hold what is exported."""
    files = [file for part in stages.PARTS for file in (folder / part).glob("*.safetensors")]
    saved = paths.files_below(folder / "run" / "checkpoints")
    return files + [file for file in saved if PARAMETERS in file.parts]


def _forget(files: list[pathlib.Path]) -> None:
    """Asks the system to drop files from its cache, so that all readers begin alike."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _time_copy(files: list[pathlib.Path], target: pathlib.Path) -> float:
    """Copies files, and flushes the copies; returns the seconds."""
    target.mkdir()
    _forget(files)
    memory = memoryview(bytearray(CHUNK))
    began = time.monotonic()
    for number, file in enumerate(files):
        with open(file, "rb", buffering=0) as source, open(target / str(number), "wb", 0) as copy:
            while count := source.readinto(memory):
                copy.write(memory[:count])
            os.fsync(copy.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def _start(folder: pathlib.Path, output: pathlib.Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _CHILD, str(folder / "run"), str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _export(
    folder: pathlib.Path, output: pathlib.Path, sources: list[pathlib.Path]
) -> dict[str, float]:
    """Exports in a process of its own; returns what it measured."""
    _forget(sources)
    process = _start(folder, output)
    told, _ = process.communicate(timeout=SECONDS)
    if process.returncode:
        raise UserError(f"the export to {output} failed: see its message above")
    return json.loads(told.splitlines()[-1])


def _kill_halfway(
    folder: pathlib.Path, output: pathlib.Path, sources: list[pathlib.Path], files: int
) -> int:
    """Starts an export and kills it when half of its files are recorded; returns how many were."""
    _forget(sources)
    process = _start(folder, output)
    unfinished = output.with_name(manifest.unfinished(output.name))
    ended = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < ended:
        if len(list(unfinished.glob(f"{RECORD}*.json"))) >= max(1, files // 2):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return len(list(unfinished.glob(f"{RECORD}*.json")))
