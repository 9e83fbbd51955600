"""Batches by the contract: each kind and task, on any number of processes, interrupted or not."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from data_pipelines.batches import make_held_out, make_iterator
from data_pipelines.transforms.lengths import load_or_measure
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard
from flamingo_jax.processing import images
from tests.data_pipelines.toy_data import (
    CASES,
    CONFIGS,
    GROUPS,
    MEAN,
    READERS,
    SIZE,
    SOURCES,
    broken,
    in_lists,
    iterator,
    numbered_image,
    pairs,
    same,
    segments_of,
    take,
    words,
)
from tests.partitioning.processes import processes


@pytest.mark.parametrize("task, kind", CASES)
def test_the_same_batches_on_any_number_of_processes_threaded_or_not(task, kind, tokenizer):
    """Array for array, with an image that cannot be read among them, which some of the
    processes never try to.
    """
    source = broken(SOURCES[kind], {5})
    one = take(iterator(task, kind, tokenizer, source=source), 8)
    for shape, count, seed in GROUPS:
        group = processes(shape, count, seed)
        parts = [
            take(
                iterator(
                    task,
                    kind,
                    tokenizer,
                    source=source,
                    host_shard=host_shard,
                    readers=READERS,
                    cache_bytes=0,
                ),
                8,
            )
            for host_shard in group.shares
        ]
        for step, batch in enumerate(one):
            same(in_lists(batch, group), group.assembled([part[step] for part in parts]))
    assert any(not np.array_equal(one[0]["tokens"], batch["tokens"]) for batch in one[1:])
    other = next(iterator(task, kind, tokenizer, seed=4))
    assert not np.array_equal(other["tokens"], one[0]["tokens"])


def test_a_process_decodes_the_images_of_its_own_devices_alone(tokenizer, monkeypatch):
    met = []
    decode = images.decode
    monkeypatch.setattr(
        images,
        "decode",
        lambda data, size, **options: met.append(data) or decode(data, size, **options),
    )

    def decoded(host_shard):
        met.clear()
        take(iterator("flamingo", "pages", tokenizer, host_shard=host_shard, cache_bytes=0), 1)
        return sorted(met)

    whole = decoded(WHOLE_BATCH)
    each = [decoded(host_shard) for host_shard in processes((1, 2, 4), 4).shares]
    assert sorted(itertools.chain(*each)) == whole and max(map(len, each)) <= len(whole) / 2


@pytest.mark.parametrize("task, kind", CASES)
@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_run_goes_on_with_the_same_batches(task, kind, stop, tokenizer):
    whole = take(iterator(task, kind, tokenizer), 9)
    began = iterator(
        task, kind, tokenizer, readers=READERS, host_shard=processes((4, 1, 2), 4).shares[1]
    )
    for _ in range(stop):
        next(began)
    state = json.loads(json.dumps(began.get_state()))
    began.close()
    assert state == {"global_next_index": 4 * stop}
    resumed = iterator(task, kind, tokenizer)
    next(resumed)
    resumed.set_state(state)
    for batch in whole[stop:]:
        same(next(resumed), batch)


@pytest.mark.parametrize("kind", ["pairs", "pages", "videos"])
def test_flamingo_batches_keep_the_contract(kind, tokenizer):
    config = CONFIGS[kind]
    seen = set()
    for batch in take(iterator("flamingo", kind, tokenizer, p_next=0.0), 12):
        rows, places = config.batch_size, config.visuals
        assert (
            batch["images"].shape == (rows * places, config.frames, SIZE, SIZE, 3)
            and batch["images"].dtype == np.uint8
        )
        assert batch["frame_mask"].shape == (rows * places, config.frames)
        for name in ("tokens", "positions", "segments", "media_index"):
            assert batch[name].shape == (rows, config.max_length) and batch[name].dtype == np.int32
        padding = batch["segments"] == 0
        assert not batch["loss_mask"][padding].any() and (batch["media_index"][padding] == -1).all()
        assert (batch["tokens"][padding] == tokenizer.pad).all()
        for row in range(rows):
            present = batch["visuals"][row] >= 0
            np.testing.assert_array_equal(
                batch["visuals"][row][present], (np.arange(places) + row * places)[present]
            )
            assert not batch["images"][row * places : (row + 1) * places][~present].any()
            for mask in segments_of(batch, row):
                tokens = batch["tokens"][row][mask]
                np.testing.assert_array_equal(batch["positions"][row][mask], np.arange(mask.sum()))
                unlearned = np.isin(tokens, [tokenizer.bos, *tokenizer.image_tag_ids])
                unlearned[0] = True
                np.testing.assert_array_equal(batch["loss_mask"][row][mask], ~unlearned)
                seen |= check_images(kind, batch, row, mask, tokenizer)
    assert len(seen) > 10


def check_images(kind, batch, row, mask, tokenizer):
    """Each caption names the number of its image, whose red is that number."""
    tokens, index = batch["tokens"][row][mask], batch["media_index"][row][mask]
    ends = np.flatnonzero(np.isin(tokens, tokenizer.image_tag_ids))
    seen = set()
    for begin, end in zip(ends, [*ends[1:], len(tokens)], strict=True):
        text = tokenizer.decode(tokens[begin + 1 : end].tolist()).strip()
        place = index[begin]
        if (
            place < 0 or " " not in text
        ):  # Past the room for visuals, or cut off by the window's end.
            continue
        number = int(text.split()[0][1:])
        image = batch["images"][batch["visuals"][row][place]]
        if kind == "pages":
            assert image[0, 0, 0, 0] == number % 256
        elif kind == "pairs":
            assert image[0, 0, 0, 0] == number
        else:
            there = batch["frame_mask"][batch["visuals"][row][place]]
            reds = image[there][:, 0, 0, 0].astype(int)
            assert len(reds) == min(4, 2 + number)
            assert ((reds - 20 * number) % 256 < 2 + number).all() and (
                np.diff(reds) % 256 == 1
            ).all()
        seen.add(text)
    return seen


def test_both_coins_and_all_captions_come_up(tokenizer):
    captions = {name: set() for name in ("pair0", "pair1")}
    it = iterator("flamingo", "pairs", tokenizer, source=pairs(2), batch_size=1)
    for _ in range(60):
        batch = next(it)
        for mask in segments_of(batch, 0):
            text = tokenizer.decode(batch["tokens"][0][mask].tolist()).removeprefix("<image>")
            captions["pair" + text.strip()[1]].add(text)
    it.close()
    for name, record in zip(captions, pairs(2), strict=True):
        both = [c.decode() if isinstance(c, bytes) else c for c in record["captions"]]
        assert captions[name] == {*both, *(" " + c for c in both)}


@pytest.mark.parametrize("kind", ["pairs", "videos"])
def test_rows_are_full_of_the_captions_that_are_shown(kind, tokenizer):
    """Captions of one record differ in length by far more than what may stay empty; another is
    shown in another epoch.

    An epoch has as many rows as the first, whatever captions it chose: the fewer the records,
    the more these differ.
    """
    rng = np.random.default_rng(5)
    fields = {
        "pairs": lambda i: {"image": numbered_image(i)},
        "videos": lambda i: {"frames": [numbered_image(i)], "fps": 1.0},
    }[kind]
    source = [
        {"id": str(i), "captions": [words(rng, 1, 16) for _ in range(5)], **fields(i)}
        for i in range(1_600)
    ]
    it = iterator(
        "flamingo",
        kind,
        tokenizer,
        source=source,
        batch_size=1,
        max_length=128,
        visuals=32,
        leading_space=0.5,
    )
    rows = it.summary()["rows"]
    shown = []
    for _ in range(2):
        epoch = [next(it) for _ in range(rows)]
        assert np.mean([batch["segments"] > 0 for batch in epoch]) > 0.95
        shown.append(
            {
                tuple(batch["tokens"][0][batch["segments"][0] == n])
                for batch in epoch
                for n in range(1, batch["segments"].max() + 1)
            }
        )
    assert len(shown[0] & shown[1]) < 1_000, "one of ten forms of each"
    it.close()
    config = dataclasses.replace(CONFIGS[kind], max_length=128, visuals=32, batch_size=1)
    padded = make_held_out(
        config,
        tokenizer=tokenizer,
        task="flamingo",
        batches=1_000,
        image_size=SIZE,
        source=source,
    )
    assert np.mean([batch["segments"] > 0 for batch in padded]) > 0.95


def test_pages_look_either_way_by_p_next(tokenizer):
    for p_next, starts in ((0.0, {-1}), (1.0, {0})):
        batch = next(iterator("flamingo", "pages", tokenizer, p_next=p_next, max_length=256))
        assert set(batch["media_index"][:, 0].tolist()) == starts or p_next == 0.0
        first = np.array([np.flatnonzero(batch["segments"][row] == 1)[0] for row in range(4)])
        assert set(batch["media_index"][np.arange(4), first].tolist()) == starts


def test_all_text_is_a_target_once_an_epoch(tokenizer):
    it = iterator("language_modelling", "text", tokenizer, batch_size=1)
    targets = []
    for _ in range(it.summary()["rows"]):
        batch = next(it)
        assert batch.keys() == {"tokens", "positions", "segments", "loss_mask"}
        assert not batch["loss_mask"][batch["positions"] == 0].any()
        targets += batch["tokens"][batch["loss_mask"]].tolist()
    it.close()
    expected = [
        token
        for record in SOURCES["text"]
        for token in [*tokenizer.encode(record["text"]), tokenizer.eos]
    ]
    assert sorted(targets) == sorted(expected)


def test_contrastive_pairs(tokenizer):
    reds = []
    for batch in take(iterator("contrastive", "pairs", tokenizer, batch_size=8), 5):
        assert batch["images"].shape == (8, SIZE, SIZE, 3) and batch["tokens"].shape == batch[
            "mask"
        ].shape == (8, 24)
        for row in range(8):
            ids = batch["tokens"][row][batch["mask"][row]]
            assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos
            number = batch["images"][row, 0, 0, 0]
            assert tokenizer.decode(ids.tolist()).startswith(f"p{number} "[: max(len(ids) - 3, 2)])
            reds.append(int(number))
    assert sorted(reds) == list(range(40)), "an epoch is every pair once"


def test_summary_accounts_for_every_record(tokenizer):
    source = [*pairs(10), {"id": "long", "image": numbered_image(1), "captions": ["star " * 200]}]
    it = iterator("flamingo", "pairs", tokenizer, source=source, batch_size=1)
    summary = it.summary()
    assert (
        summary["records"] == 11
        and summary["cut"] == 1
        and summary["too_long"] == 0
        and summary["dropped"] == 0
    )
    full = [b for b in take(it, summary["rows"]) if (b["segments"] == 1).all()]
    assert len(full) == 1
    assert full[0]["tokens"][0][-2:].tolist() == [
        tokenizer.eoc,
        tokenizer.eos,
    ], "a cut caption keeps its end marks"


def test_cut_contrastive_captions_are_counted_once_each(tokenizer):
    source = [
        {"id": str(i), "image": numbered_image(i), "captions": ["star" if i else "star " * 200]}
        for i in range(8)
    ]
    it = iterator("contrastive", "pairs", tokenizer, source=source, batch_size=8)
    assert it.summary()["cut"] == 0
    for _ in range(2):
        next(it)
        assert it.summary()["cut"] == 1
    it.close()


@pytest.mark.parametrize("task, kind", CASES)
def test_held_out_batches_are_fixed(task, kind, tokenizer):
    config = dataclasses.replace(CONFIGS[kind], batch_size=2)

    def make(host_shard):
        return make_held_out(
            config,
            tokenizer=tokenizer,
            task=task,
            batches=2,
            image_size=SIZE,
            mean=MEAN,
            host_shard=host_shard,
            text_length=24,
            source=SOURCES[kind],
        )

    group = processes((2, 1, 4), 4)
    one, parts = make(WHOLE_BATCH), [make(host_shard) for host_shard in group.shares]
    assert len(one) == 2
    for step, batch in enumerate(one):
        same(in_lists(batch, group), group.assembled([part[step] for part in parts]))


def test_a_small_held_out_set_is_padded(tokenizer):
    config = dataclasses.replace(CONFIGS["pairs"], batch_size=8)
    make = dict(tokenizer=tokenizer, batches=5, image_size=SIZE, mean=MEAN, source=pairs(3))
    (batch,) = make_held_out(config, task="flamingo", **make)
    assert batch["tokens"].shape[0] == 8 and (batch["segments"].max(axis=1) == 0).sum() >= 5
    assert (batch["visuals"] >= 0).sum() == 3
    with pytest.raises(UserError, match="batch_size"):
        make_held_out(config, task="contrastive", **make)


def test_bad_configs_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="holds no dataset"):
        make_iterator(DatasetConfig(path=str(tmp_path)), tokenizer=tokenizer, task="flamingo")
    with pytest.raises(UserError, match="kind text or questions"):
        iterator("language_modelling", "pairs", tokenizer)
    with pytest.raises(UserError, match="3 data shards"):
        iterator("flamingo", "pairs", tokenizer, host_shard=HostShard(row_shards=3))
    with pytest.raises(UserError, match="is empty"):
        iterator("flamingo", "pairs", tokenizer, source=[])
    with pytest.raises(UserError, match="no room for a caption"):
        iterator("flamingo", "pairs", tokenizer, max_length=4)
    with pytest.raises(UserError, match="visuals"):
        iterator("flamingo", "pairs", tokenizer, visuals=0)


def test_lengths_are_kept_beside_the_dataset(tokenizer, tmp_path):
    made = load_or_measure(SOURCES["pages"], "pages", tokenizer, tmp_path, "train")
    (file,) = tmp_path.iterdir()
    assert file.name == f"lengths_{tokenizer.fingerprint}_train.npz"
    assert made.visuals.tolist() == [len(page["images"]) for page in SOURCES["pages"]]
    again = load_or_measure([None] * 20, "pages", tokenizer, tmp_path, "train")
    np.testing.assert_array_equal(again.tokens, made.tokens)
    assert (
        len(load_or_measure(SOURCES["pages"][:7], "pages", tokenizer, tmp_path, "train").tokens)
        == 7
    )
    unwritable = load_or_measure(
        SOURCES["pages"], "pages", tokenizer, tmp_path / "nowhere", "train"
    )
    np.testing.assert_array_equal(unwritable.tokens, made.tokens)
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(
        load_or_measure(SOURCES["pages"], "pages", tokenizer, tmp_path, "train").tokens,
        made.tokens,
    )


def test_a_contrastive_batch_larger_than_the_dataset_is_refused(tokenizer):
    dataset = DatasetConfig(kind="pairs", batch_size=41)
    with pytest.raises(UserError, match="has 40 pairs, fewer than its batch_size of 41"):
        make_iterator(
            dataset,
            tokenizer=tokenizer,
            task="contrastive",
            image_size=SIZE,
            mean=MEAN,
            source=SOURCES["pairs"],
        )
