"""Epochs of the contrastive stage meet in no batch, and datasets of one size have nothing
random in common.
"""

import itertools

import numpy as np
import pytest

from data_pipelines.iterators import make_iterators
from data_pipelines.transforms.lengths import measure
from data_pipelines.transforms.packing import plan_rows
from data_pipelines.transforms.randomness import RecordRandom, generator
from flamingo_jax.experiment import DatasetConfig, Experiment, LanguageModelConfig
from tests.data_pipelines.faults import build
from tests.data_pipelines.toy_data import (
    in_lists,
    iterator,
    pairs,
    same,
    shared_questions,
    take,
)
from tests.partitioning.processes import processes

GIVEN = {"pairs": pairs(43), "questions": shared_questions(43, about=3)}
"""43 pairs and 15 images that are asked about; neither is a multiple of the batches below."""


def reds(batch):
    """The numbers of the images in a batch of pairs."""
    return batch["images"][:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    "kind, items, size", [("pairs", 43, 4), ("pairs", 43, 25), ("questions", 15, 4)]
)
def test_no_contrastive_batch_holds_a_pair_twice(kind, items, size, tokenizer):
    """A pair twice is its own negative.

    What an epoch leaves out is counted, and stands in another.
    """
    it = iterator("contrastive", kind, tokenizer, source=GIVEN[kind], batch_size=size)
    each = items // size
    assert it.summary()["rows"] == each * size and it.summary()["dropped"] == items % size
    epochs = [[reds(batch) for batch in itertools.islice(it, each)] for _ in range(12)]
    for epoch in epochs:
        met = list(itertools.chain(*epoch))
        assert len(set(met)) == len(met) == each * size
    left_out = [frozenset(range(items)) - set(itertools.chain(*epoch)) for epoch in epochs]
    assert len(set(left_out)) > 1 and not frozenset.intersection(*left_out)
    it.close()


@pytest.mark.parametrize("kind", GIVEN)
def test_the_end_of_an_epoch_is_the_same_resumed_and_shared_out(kind, tokenizer):
    options = dict(source=GIVEN[kind], batch_size=8)
    one = take(iterator("contrastive", kind, tokenizer, **options), 12)
    resumed = iterator("contrastive", kind, tokenizer, **options)
    for stop in (1, 4, 5, 6, 11):
        resumed.set_state({"global_next_index": 8 * stop})
        same(next(resumed), one[stop])
    resumed.close()
    group = processes((4, 1, 2), 4)
    parts = [
        take(iterator("contrastive", kind, tokenizer, host_shard=host_shard, **options), 12)
        for host_shard in group.shares
    ]
    for step, batch in enumerate(one):
        same(in_lists(batch, group), group.assembled([part[step] for part in parts]))


def test_no_pair_stands_twice_after_the_batch_size_was_changed(tokenizer):
    it = iterator("contrastive", "pairs", tokenizer, source=GIVEN["pairs"], batch_size=12)
    for first in (4, 20, 28, 32, 100):
        it.set_state({"global_next_index": first})
        for batch in itertools.islice(it, 4):
            assert len(set(reds(batch))) == 12
    it.close()


def test_datasets_of_one_size_share_no_order_no_captions_and_no_draws(tokenizer):
    def orders(dataset):
        made = plan_rows(
            np.ones(90, int),
            np.ones(90, int),
            row_length=1,
            row_visuals=1,
            seed=3,
            epoch=1,
            dataset=dataset,
        )
        return made.items.tolist()

    lengths = measure(pairs(90), "pairs", tokenizer)
    drawn = {
        "order": orders,
        "captions": lambda dataset: lengths.choose(0.5, 3, 1, dataset).caption.tolist(),
        "spaces": lambda dataset: lengths.choose(0.5, 3, 1, dataset).space.tolist(),
        "draws": lambda dataset: RecordRandom(3, 1, "a record", dataset=dataset).order(20),
        "numbers": (
            lambda dataset: generator("order", 3, dataset, 1).integers(9, size=30).tolist()
        ),
    }
    for what, draw in drawn.items():
        assert draw("coco") == draw("coco") != draw("ltip"), what
    # No name can be made to look like another name, seed or epoch.
    assert RecordRandom(3, 1, "x/y", dataset="a").order(20) != RecordRandom(
        3, 1, "y", dataset="a'/'x"
    ).order(20)
    agree = np.mean(np.equal(drawn["captions"]("coco"), drawn["captions"]("ltip")))
    assert abs(agree - 0.5) < 4 * np.sqrt(0.25 / 90)


@pytest.mark.parametrize(
    "task, kind",
    [("contrastive", "pairs"), ("flamingo", "pages"), ("language_modelling", "text")],
)
def test_the_same_records_under_two_names_come_in_two_orders(task, kind, tokenizer):
    def tokens(name):
        return [batch["tokens"] for batch in take(iterator(task, kind, tokenizer, name=name), 3)]

    first, again, other = map(tokens, ("one", "one", "two"))
    assert all(map(np.array_equal, first, again)) and not any(map(np.array_equal, first, other))


def test_a_config_names_its_datasets(tokenizer, tmp_path, monkeypatch):
    """The same records, read twice by one experiment: two orders."""
    dataset = DatasetConfig(
        "text",
        str(build(tmp_path, "text", 40, monkeypatch)),
        batch_size=4,
        max_length=32,
        visuals=0,
    )
    both = {"first": dataset, "second": dataset}
    experiment = Experiment(
        name="two",
        task="language_modelling",
        tokenizer="",
        data=both,
        language_model=LanguageModelConfig(vocab_size=320),
    )
    iterators = make_iterators(experiment, tokenizer)
    first, second = (np.stack([next(it)["tokens"] for _ in range(3)]) for it in iterators.values())
    assert not np.array_equal(first, second)
    for it in iterators.values():
        it.close()
