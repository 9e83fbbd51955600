"""The timing of reading: what it counts, and that it leaves things as they were."""

import time

import numpy as np
import pytest

from data_pipelines import timing
from flamingo_jax.processing import images
from flamingo_jax.processing.tokenizer import Tokenizer
from tests.data_pipelines.toy_data import (
    SIZE,
    iterator,
    numbered_image,
    take,
)


@pytest.mark.parametrize("kind", ["pairs", "pages", "videos"])
def test_reading_counts_what_the_rows_hold(kind: str, tokenizer: Tokenizer) -> None:
    decode = images.decode
    it = iterator("flamingo", kind, tokenizer, cache_bytes=0)
    reading = timing.time_reading(it, SIZE, 3)
    it.close()
    batches = take(iterator("flamingo", kind, tokenizer), 3)
    assert reading.images == sum(int(batch["frame_mask"].sum()) for batch in batches)
    assert reading.fill == pytest.approx(np.mean([batch["segments"] > 0 for batch in batches]))
    assert reading.rows > 0 and reading.bare > 0 and reading.share == reading.rows / reading.bare
    assert images.decode is decode


def test_readers_are_timed_over_the_same_images(tokenizer: Tokenizer) -> None:
    rates = timing.time_readers(
        lambda readers: iterator("contrastive", "pairs", tokenizer, readers=readers, cache_bytes=0),
        [1, 3],
        4,
    )
    assert list(rates) == [1, 3] and min(rates.values()) > 0


def test_the_bare_loop_makes_the_same_images() -> None:
    np.testing.assert_array_equal(
        timing.bare(numbered_image(7), 5), images.decode(numbered_image(7), 5)
    )


def test_waiting_is_what_a_step_waits_for() -> None:
    class Slow:
        def __next__(self) -> None:
            time.sleep(0.02)

    assert timing.waiting_share({"a": Slow(), "b": Slow()}, 0.04, 10) == pytest.approx(
        0.5, abs=0.15
    )  # type: ignore[dict-item]
    assert timing.waiting_share({"a": iter(range(100))}, 0.01, 10) < 0.1  # type: ignore[dict-item]
