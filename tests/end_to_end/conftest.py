"""The synthetic world, small, for every test of whole runs."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

from data_pipelines.build.synthetic_world import build_quickstart
from flamingo_jax.experiment import MeshConfig
from flamingo_jax.partitioning import mesh
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.training import loop, trained_run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Its datasets and tokenizer, two dozen records a split."""
    folder = tmp_path_factory.mktemp("world")
    build_quickstart(folder, limit=24)
    return folder


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Lets a module's runs have one device: they compile in half of the time of eight."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (loop, mesh, trained_run):
            patch.setattr(
                module, "make_mesh", lambda config: make_mesh(MeshConfig(), jax.devices()[:1])
            )
        yield
