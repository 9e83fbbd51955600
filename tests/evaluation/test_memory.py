"""Memory does not grow with the number of queries."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from flamingo_jax.evaluation import media
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import ImageFile
from flamingo_jax.evaluation.prompts import CAPTION
from flamingo_jax.evaluation.protocol import asking
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings
from flamingo_jax.evaluation.protocol.open_ended import OpenEnded
from flamingo_jax.inference.completion import Completion
from flamingo_jax.inference.prompts import Prompt
from tests.evaluation.world import ScriptedEngine

QUERIES, SUPPORT, SHOTS = 5000, 2048, 32


class MeasuringEngine(ScriptedEngine):
    """Keeps no prompts, and notes the process's memory at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def generate(
        self, prompts: Sequence[Prompt], decoding: Any, *, seed: int = 0, progress: Any = None
    ) -> list[Completion]:
        self.sizes.append(psutil.Process().memory_info().rss)
        return [Completion("a red circle", -1.0, True) for _ in prompts]


@pytest.mark.scale
def test_thousands_of_queries_with_many_shots_hold_memory_flat(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All decoded images would take 43 MB, and a prompt's images 33 times as much again."""
    monkeypatch.setattr(media, "POOL_BYTES", 4 << 20)
    monkeypatch.setattr(asking, "CHUNK_BYTES", 4 << 20)
    examples = []
    rng = np.random.default_rng(0)
    for number in range(QUERIES + SUPPORT):
        file = tmp_path / f"{number}.png"
        colour = tuple(rng.integers(0, 256, 3).tolist())
        Image.new("RGB", (48, 36), colour).save(file)
        examples.append(BenchmarkExample(str(number), ImageFile(file), (f"a thing {number}",)))
    engine = MeasuringEngine()
    asked = OpenEnded("made", examples[:QUERIES], examples[QUERIES:], CAPTION, None)
    result = asked.run(engine, EvaluationSettings(shots=SHOTS, selection="random_per_query"))
    assert len(result.predictions) == QUERIES
    sizes = np.array(engine.sizes)
    early, late = sizes[len(sizes) // 10], sizes[len(sizes) // 2 :].max()
    # The predictions themselves are kept: their prompts, a kilobyte each.
    assert late - early < 24 << 20, f"{early / 2**20:.0f} MiB, later {late / 2**20:.0f}"
