"""Images that cannot be read among good ones: masked, counted, and in the end too many."""

import numpy as np
import pytest

from flamingo_jax.errors import UserError
from tests.data_pipelines.toy_data import (
    READERS,
    SOURCES,
    broken,
    iterator,
    masked,
    pairs,
    same,
    take,
)
from tests.partitioning.processes import processes


@pytest.mark.parametrize("kind", ["pairs", "pages", "videos"])
def test_a_bad_image_masks_its_segment_and_moves_nothing(kind, tokenizer, caplog):
    record = SOURCES[kind][5]
    good, bad = (
        iterator("flamingo", kind, tokenizer, source=s, batch_size=1)
        for s in (SOURCES[kind], broken(SOURCES[kind], {5}))
    )
    hit = 0
    for _ in range(2 * good.summary()["rows"]):
        whole, holed = next(good), next(bad)
        for name in ("tokens", "positions", "segments", "media_index", "loss_mask", "visuals"):
            np.testing.assert_array_equal(whole[name], holed[name])
        same(whole, masked(whole))
        holed = masked(holed)
        changed = (whole["loss_mask"] != holed["loss_mask"])[0]
        places = (whole["visuals"] != holed["visuals"])[0]
        if changed.any():
            hit += 1
            (segment,) = set(whole["segments"][0][changed].tolist())
            inside = whole["segments"][0] == segment
            assert (
                not holed["loss_mask"][0][inside].any()
                and (holed["media_index"][0][inside] == -1).all()
            )
            np.testing.assert_array_equal(
                whole["media_index"][0][~inside], holed["media_index"][0][~inside]
            )
        np.testing.assert_array_equal(whole["images"][~places], holed["images"][~places])
        assert (
            not holed["images"][places].any()
            and not holed["frame_mask"][places].any()
            and (holed["visuals"][0][places] == -1).all()
        )
    assert hit == 2, "once an epoch"
    name = record["id"].decode() if isinstance(record["id"], bytes) else record["id"]
    assert bad.summary()["failed"] == [name]
    assert sum(name in message for message in caplog.messages) == 1


def test_a_bad_contrastive_pair_is_marked_by_an_empty_mask(tokenizer):
    """The sign by which the contrastive task leaves a row out of its loss."""
    for batch in take(
        iterator("contrastive", "pairs", tokenizer, source=broken(pairs(8), {3}), batch_size=8),
        2,
    ):
        (row,) = np.flatnonzero(~batch["images"].any(axis=(1, 2, 3)))
        np.testing.assert_array_equal(np.flatnonzero(~batch["mask"].any(axis=1)), [row])
        assert (batch["tokens"][row] == tokenizer.pad).all()


@pytest.mark.parametrize("readers", [None, READERS])
def test_too_many_bad_images_stop_the_run(readers, tokenizer):
    it = iterator(
        "flamingo",
        "pairs",
        tokenizer,
        source=broken(pairs(200), set(range(0, 200, 20))),
        readers=readers,
        path="some/where",
    )
    with pytest.raises(UserError, match="some/where"):
        take(it, 40)
    it.close()


def test_the_share_of_bad_images_is_that_of_those_a_process_reads(tokenizer):
    """Four processes share every row: what each counts as seen is what it decodes itself, and
    no good image for what another does.
    """
    bad = {7, 50, 99, 120}
    rows = iterator(
        "flamingo", "pairs", tokenizer, source=broken(pairs(200), bad), batch_size=1, visuals=4
    ).summary()["rows"]
    seen, failed = [], set()
    for host_shard in processes((1, 1, 8), 4).shares:
        it = iterator(
            "flamingo",
            "pairs",
            tokenizer,
            source=broken(pairs(200), bad),
            batch_size=2,
            visuals=4,
            host_shard=host_shard,
        )
        take(it, rows // 2)
        seen.append(it._rows._failures.seen)
        failed |= set(it.summary()["failed"])
    everyone = iterator(
        "flamingo", "pairs", tokenizer, source=broken(pairs(200), bad), batch_size=2, visuals=4
    )
    take(everyone, rows // 2)
    assert sum(seen) == everyone._rows._failures.seen > 150 and 0 < min(seen) <= max(seen) < 100
    assert failed == set(everyone.summary()["failed"]) and len(failed) >= 3
