"""The synthetic world, small, for every test of whole runs."""

import pathlib

import pytest

from data_pipelines.build.synthetic_world import build_quickstart


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Its datasets and tokenizer, two dozen records a split."""
    folder = tmp_path_factory.mktemp("world")
    build_quickstart(folder, limit=24)
    return folder
