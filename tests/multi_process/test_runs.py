"""Runs on two and four processes, and on another number after every start, learn what a run of
one process learns.
"""

import pathlib

import numpy as np
import pytest

from tests.multi_process.run_processes import losses, run

DEVICES = 4
"""Of every run, whatever its processes."""
EVERY = ("--config.training.save_every=100",)


def start(count: int, config: str, workdir: pathlib.Path, *overrides: str) -> None:
    run(count, config, workdir, *EVERY, *overrides, devices=DEVICES // count)


@pytest.fixture(scope="module")
def config(data: pathlib.Path) -> str:
    return f"tests/end_to_end/small.py:flamingo,{data}"


@pytest.fixture(scope="module")
def alone(config: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    start(1, config, workdir)
    return losses(workdir)


@pytest.mark.scale
@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, {}),
        (4, {}),
        (2, {"data": 1, "model": 4}),
        (4, {"data": 2, "model": 2}),
        (4, {"data": 1, "fsdp": 2, "model": 2}),
    ],
    ids=["2", "4", "2, model across", "4, model across", "4, fsdp and model across"],
)
def test_several_processes_have_the_losses_of_one(
    count: int,
    mesh: dict[str, int],
    config: str,
    alone: dict[int, float],
    tmp_path: pathlib.Path,
) -> None:
    start(
        count,
        config,
        tmp_path / "run",
        *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
    )
    found = losses(tmp_path / "run")
    assert list(found) == list(alone) == list(range(1, 31))
    worst = max(abs(found[step] - loss) / abs(loss) for step, loss in alone.items())
    print(f"\n{count} processes, mesh {mesh or 'data=4'}: at most {worst:.1e} from one process")
    assert worst <= 1e-5


@pytest.mark.scale
def test_a_chain_of_starts_ends_where_the_unbroken_run_does(
    config: str, alone: dict[int, float], tmp_path: pathlib.Path
) -> None:
    """4, 2, 1 and 4 processes, `model` across processes in the first and the last: every batch
    has the rows that one process gives it.
    """
    chain = [
        (4, 8, ("--config.mesh.data=2", "--config.mesh.model=2")),
        (2, 15, ()),
        (1, 22, ("--config.mesh.data=2", "--config.mesh.fsdp=2")),
        (4, 30, ("--config.mesh.data=1", "--config.mesh.model=4")),
    ]
    for count, steps, mesh in chain:
        start(count, config, tmp_path / "run", f"--config.training.steps={steps}", *mesh)
    found = losses(tmp_path / "run")
    assert list(found) == list(alone)
    np.testing.assert_allclose(list(found.values()), list(alone.values()), rtol=1e-4)
    print(
        f"\nthe chain ends {abs(found[30] - alone[30]) / abs(alone[30]):.1e} from the unbroken run"
    )
