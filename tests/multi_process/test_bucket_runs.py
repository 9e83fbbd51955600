"""Several processes whose workdir is in a bucket: each writes the chunks of its own devices, and
the first the manifest, once all are there.
"""

import pathlib

import pytest

from flamingo_jax import paths
from flamingo_jax.errors import EXIT_BAD_INPUT
from tests.multi_process.run_processes import RunProcesses, losses
from tests.object_store import ObjectStore, object_store, s3_server  # noqa: F401

QUICK = ("--config.mesh.fsdp=2", "--config.training.save_every=3")


def train(
    count: int, config: str, workdir: pathlib.Path, logs: pathlib.Path, steps: int, devices: int
) -> None:
    flags = (*QUICK, f"--config.training.steps={steps}")
    logs.mkdir(exist_ok=True)
    with RunProcesses(count, config, workdir, *flags, devices=devices, logs=logs) as started:
        ended = started.finish()
    assert ended.codes == [0] * count, "\n=====\n".join(ended.logs)


@pytest.mark.scale
def test_two_processes_save_in_a_bucket_and_one_goes_on(
    data: pathlib.Path,
    object_store: ObjectStore,  # noqa: F811
    tmp_path: pathlib.Path,
) -> None:
    config = f"tests/end_to_end/small.py:language_model,{data}"
    object_store.faults.one_in = 20
    bucket = paths.as_path(f"{object_store.address}/run")
    for place, workdir in (("bucket", bucket), ("disk", tmp_path / "run")):
        train(2, config, workdir, tmp_path / place, 6, 2)
        with RunProcesses(1, config, workdir, "--config.seed=9", logs=tmp_path / place) as other:
            assert other.finish().codes == [EXIT_BAD_INPUT]
        train(1, config, workdir, tmp_path / place, 9, 4)
    assert losses(bucket) == losses(tmp_path / "run") and max(losses(bucket)) == 9
    # What devices of two processes hold apart is in chunks of both.
    names = paths.sizes_below(bucket / "checkpoints" / "6" / "state")
    arrays = [name.rpartition("/")[0] for name in names if name.endswith("zarr.json")]
    chunks = {array: sum(name.startswith(f"{array}/c") for name in names) for array in arrays}
    assert min(chunks.values()) == 1 and max(chunks.values()) > 1
