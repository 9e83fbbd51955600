"""RICES at scale: what several processes store and search is brute force in float64."""

import json
import pathlib

import numpy as np
import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.planning import rices_timing
from flamingo_jax.planning.rices_timing import RicesWork, time_rices
from tests.launch import commands


def test_processes_store_and_search_their_own_rows(tmp_path: pathlib.Path) -> None:
    """Of three batches, the last one smaller, one process has one and the other two."""
    work = RicesWork(rows=2 * 4096 + 100, queries=30, width=24, sample=30, processes=2)
    timing = time_rices(work, tmp_path / "made")
    assert (timing.compared, timing.equal) == (30, 30)
    assert timing.bytes == 4 * work.rows * work.width and timing.peak > 10 << 20
    assert 0 < timing.fill < timing.whole and 0 < timing.search < timing.whole
    assert not (tmp_path / "made").exists()


def test_the_command_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"ROWS": 500, "QUERIES": 8, "WIDTH": 16}
    benchmark = commands.load("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (sizes | {"JSON": True}).items():
            patch.setattr(benchmark, name, commands.flag(value))
        assert benchmark.rices() == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["rows"], printed["bytes"], printed["sample"]) == (500, 32_000, 8)
        assert printed["equal"] == printed["compared"] == 8
        assert printed["fill_rate"] == pytest.approx(32_000 / printed["fill"])
        patch.setattr(benchmark, "JSON", commands.flag(False))
        assert benchmark.rices() == 0
        assert "8 of 8 queries" in " ".join(capsys.readouterr().out.split())


def test_made_embeddings_have_twins() -> None:
    work = RicesWork(rows=4096 + 200, queries=5, width=16)
    last = rices_timing.made_embeddings(work, 1)
    assert last.shape == (200, 16) and (last[63] == last[62]).all()
    np.testing.assert_allclose(np.linalg.norm(last, axis=1), 1, rtol=1e-6)
    assert (last[:100] != rices_timing.made_embeddings(work, 0)[:100]).any(axis=1).all()


def test_a_folder_is_not_written_over(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        time_rices(RicesWork(1, 1, 1), tmp_path)
    with pytest.raises(UserError, match=r"GB free, but the embeddings take 4e\+09 GB"):
        time_rices(RicesWork(10**15, 1, 1000), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.scale
@pytest.mark.parametrize(("width", "processes"), [(1024, 1), (512, 2)])
def test_a_million_embeddings_are_searched_exactly_in_little_memory(
    width: int, processes: int, tmp_path: pathlib.Path
) -> None:
    """`python -m launch.benchmark rices` measures the time too."""
    work = RicesWork(1_000_000, 1000, width, processes=processes)
    timing = time_rices(work, tmp_path / "made")
    print(timing)
    assert (timing.compared, timing.equal) == (work.sample, work.sample)
    assert 0 < timing.peak < 1e9
