"""What is drawn at random for a record: even, of one visit, and off in evaluation."""

import dataclasses
import zlib

import numpy as np
import pytest

from data_pipelines.batches import make_held_out
from data_pipelines.transforms.augmentation import draw
from data_pipelines.transforms.randomness import RecordRandom
from flamingo_jax.processing import images
from tests.data_pipelines.toy_data import (
    CONFIGS,
    GROUPS,
    MEAN,
    READERS,
    SIZE,
    SOURCES,
    in_lists,
    iterator,
    same,
    take,
)
from tests.partitioning.processes import processes


@pytest.mark.parametrize(
    "task, kind", [("flamingo", "videos"), ("flamingo", "pages"), ("contrastive", "pairs")]
)
def test_the_same_augmentation_on_any_number_of_processes_and_after_a_resume(task, kind, tokenizer):
    options = {"source": SOURCES[kind], "flip": True, "colour": 0.3}
    one = take(iterator(task, kind, tokenizer, **options), 8)
    for shape, count, seed in GROUPS:
        group, parts = processes(shape, count, seed), []
        for host_shard in group.shares:
            it = iterator(
                task,
                kind,
                tokenizer,
                host_shard=host_shard,
                readers=READERS,
                cache_bytes=0,
                **options,
            )
            it.set_state({"global_next_index": 5 * CONFIGS[kind].batch_size})
            parts.append(take(it, 3))
        for step, batch in enumerate(one[5:]):
            assert batch["jitter"].any()
            same(in_lists(batch, group), group.assembled([part[step] for part in parts]))


def test_draws_are_even_and_of_one_visit():
    def of(visit, seed=0, epoch=0):
        return RecordRandom(seed, epoch, f"record {visit}")

    counts = np.bincount([of(visit).below(5) for visit in range(4_000)], minlength=5)
    assert abs(counts - 800).max() < 4 * np.sqrt(800)
    values = np.array([[draws.uniform(), draws.uniform(-3, 1)] for draws in map(of, range(4_000))])
    assert (
        values[:, 0].min() >= 0
        and values[:, 0].max() < 1
        and values[:, 1].min() >= -3
        and values[:, 1].max() < 1
    )
    assert abs(values.mean(0) - [0.5, -1]).max() < 0.06 and abs(np.corrcoef(values.T)[0, 1]) < 0.06
    assert abs(sum(of(visit).happens(0.3) for visit in range(4_000)) - 1200) < 4 * np.sqrt(
        4_000 * 0.3 * 0.7
    )
    assert (
        sorted(of(1).order(6)) == list(range(6))
        and len({tuple(of(visit).order(3)) for visit in range(100)}) == 6
    )
    assert of(1).order(9) == of(1).order(9) != of(1, seed=1).order(9) != of(1, epoch=1).order(9)


@pytest.mark.parametrize(
    "task, kind", [("flamingo", "videos"), ("flamingo", "pages"), ("contrastive", "pairs")]
)
def test_augmentation_flips_pixels_and_leaves_colours_to_the_device(
    task, kind, tokenizer, monkeypatch
):
    """One draw for all frames of a visual; images are the plain ones or their mirror images,
    and jitter has their sizes.
    """

    def noise(data, size, **_):
        return np.random.default_rng(zlib.crc32(data)).integers(0, 256, (size, 6, 3), np.uint8)

    monkeypatch.setattr(images, "decode", noise)
    plain = take(iterator(task, kind, tokenizer), 6)
    turned = take(iterator(task, kind, tokenizer, flip=True, colour=0.3, readers=READERS), 6)
    drawn, flips = [], []
    for one, other in zip(plain, turned, strict=True):
        assert set(other) - set(one) == {"jitter"}
        for name in set(one) - {"images", "tokens", "mask"}:
            np.testing.assert_array_equal(one[name], other[name])
        shown, jitter = one["images"].reshape(-1, SIZE, SIZE, 3), other["jitter"].reshape(-1, 6)
        assert other["jitter"].dtype == np.float32 and other["jitter"].shape == (
            *one["images"].shape[:-3],
            6,
        )
        for before, after, row in zip(
            shown, other["images"].reshape(shown.shape), jitter, strict=True
        ):
            if not before.any():
                assert not after.any() and not row.any()
                continue
            mirrored = np.array_equal(after[:, ::-1], before)
            assert mirrored != np.array_equal(after, before)
            flips.append(mirrored)
            drawn.append(row)
            assert max(row[4:]) == SIZE and min(row[4:]) >= 1
        if kind == "videos":
            present = one["frame_mask"]
            same_in_clip = [
                np.ptp(clip[mask, :4], axis=0).max()
                for clip, mask in zip(other["jitter"], present, strict=True)
                if mask.any()
            ]
            assert max(same_in_clip) == 0
    factors = np.array(drawn)[:, :4]
    assert 0 < sum(flips) < len(flips) and len(np.unique(factors[:, 0])) > 10
    assert (abs(factors[:, :3] - 1) <= 0.3 + 1e-6).all() and (
        abs(factors[:, 3]) <= 0.03 + 1e-6
    ).all()


def test_nothing_is_drawn_where_augmentation_is_off():
    assert draw(np.random.default_rng(0).uniform, flip=False, colour=0.0) is None


def test_held_out_images_are_not_augmented(tokenizer):
    """Also where a config asks for it."""
    config = dataclasses.replace(CONFIGS["pairs"], flip=True, colour=0.5)
    options = dict(
        tokenizer=tokenizer,
        task="flamingo",
        batches=2,
        image_size=SIZE,
        mean=MEAN,
        source=SOURCES["pairs"],
    )
    for one, other in zip(
        make_held_out(CONFIGS["pairs"], **options),
        make_held_out(config, readers=READERS, **options),
        strict=True,
    ):
        same(one, other)
