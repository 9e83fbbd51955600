"""Batches by the contract: each kind and task, on any number of processes, interrupted or not,
with bad images among the good.
"""

import dataclasses
import io
import itertools
import json
import zlib

import jax
import numpy as np
import pytest
import sentencepiece
from PIL import Image

from data_pipelines.batches import make_held_out, make_iterator
from data_pipelines.readers import Readers
from data_pipelines.transforms.augmentation import draw
from data_pipelines.transforms.lengths import load_or_measure, measure
from data_pipelines.transforms.randomness import RecordRandom
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.prompts import QUESTION, few_shot
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.inference.prompts import tokenise
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH, HostShard
from flamingo_jax.partitioning.mesh import BY_VISUAL
from flamingo_jax.processing import images
from flamingo_jax.processing.tokenizer import SentencePieceTokenizer, Tokenizer
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.tasks.flamingo import without_failed
from tests.partitioning.processes import processes

MEAN = (0.2, 0.4, 0.6)
SIZE = 8
WORDS = ["red", "blue", "green", "circle", "square", "star", "left", "right", "a", "the"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def make_tokenizer() -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS), "This is a dax. Output: wug"] * 20),
        model_writer=model,
        vocab_size=320,
        pad_id=3,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
        user_defined_symbols=["<image>"],
    )
    return SentencePieceTokenizer(model.getvalue())


def numbered_image(number: int) -> bytes:
    """An image that says which one it is: its red is `number`."""
    data = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number % 256, 100, 50)).save(data, "PNG")
    return data.getvalue()


def words(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def pairs(count=40):
    rng = np.random.default_rng(0)
    return [
        {
            "id": f"pair{i}".encode(),
            "image": numbered_image(i),
            "captions": [f"p{i} {words(rng, 2, 9)}".encode(), f"p{i} {words(rng, 2, 5)}"],
        }
        for i in range(count)
    ]


def pages(count=20):
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        k = int(rng.integers(1, 6))
        texts = [""] + [f"q{10 * i + j} {words(rng, 2, 8)}" for j in range(k)]
        made.append(
            {
                "id": f"page{i}",
                "texts": texts,
                "images": [numbered_image(10 * i + j) for j in range(k)],
            }
        )
    return made


def videos(count=12):
    return [
        {
            "id": f"video{i}",
            "frames": [numbered_image(20 * i + j) for j in range(2 + i)],
            "fps": 1.0,
            "captions": [f"v{i} star left"],
        }
        for i in range(count)
    ]


def texts(count=15):
    rng = np.random.default_rng(2)
    return [{"id": f"text{i}", "text": f"t{i} {words(rng, 3, 40)}"} for i in range(count)]


def questions(count=30):
    """About images and clips by turns; their first word names their first frame."""
    return [
        {
            "id": f"question{i}",
            "frames": [numbered_image(7 * i + j) for j in range(1 + i % 2 * 3)],
            "question": f"n{i} star or circle?",
            "answers": [b"red", "blue a"][: 1 + i % 2],
            "type": "",
        }
        for i in range(count)
    ]


SOURCES = {
    "pairs": pairs(),
    "pages": pages(),
    "videos": videos(),
    "text": texts(),
    "questions": questions(),
}
CONFIGS = {
    "pairs": DatasetConfig(kind="pairs", batch_size=4, max_length=64, visuals=5),
    "pages": DatasetConfig(kind="pages", batch_size=4, max_length=48, visuals=3, p_next=0.5),
    "videos": DatasetConfig(kind="videos", batch_size=4, max_length=64, visuals=3, frames=4),
    "text": DatasetConfig(kind="text", batch_size=4, max_length=32, visuals=0),
    "questions": DatasetConfig(kind="questions", batch_size=4, max_length=96, visuals=3, frames=2),
}
READERS = Readers(3)
CASES = [
    ("contrastive", "pairs"),
    ("flamingo", "pairs"),
    ("flamingo", "pages"),
    ("flamingo", "videos"),
    ("language_modelling", "text"),
    ("flamingo", "questions"),
    ("language_modelling", "questions"),
]


def iterator(
    task,
    kind,
    tokenizer,
    *,
    source=None,
    readers=None,
    seed=3,
    host_shard=WHOLE_BATCH,
    cache_bytes=1 << 20,
    name="",
    **changes,
):
    return make_iterator(
        dataclasses.replace(CONFIGS[kind], **changes),
        tokenizer=tokenizer,
        task=task,
        image_size=SIZE,
        mean=MEAN,
        seed=seed,
        host_shard=host_shard,
        text_length=24,
        source=SOURCES[kind] if source is None else source,
        readers=readers,
        cache_bytes=cache_bytes,
        name=name,
    )


def take(it, count):
    batches = [next(it) for _ in range(count)]
    it.close()
    return batches


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def in_lists(batch, group):
    """The arrays of one process with every row shard's list of visuals filled up with blanks
    for the mesh's `model`.
    """
    rows, model = group.mesh.size // group.mesh.shape["model"], group.mesh.shape["model"]
    lists = {
        name: a.reshape(rows, -1, *a.shape[1:])
        for name, a in batch.items()
        if name in BY_VISUAL and "visuals" in batch
    }
    filled = {
        name: np.pad(a, [(0, 0), (0, -a.shape[1] % model), *[(0, 0)] * (a.ndim - 2)])
        for name, a in lists.items()
    }
    return batch | {name: a.reshape(-1, *a.shape[2:]) for name, a in filled.items()}


GROUPS = [((2, 2, 2), 2, None), ((4, 1, 2), 4, 0), ((1, 2, 4), 4, None), ((1, 1, 8), 2, 1)]
"""Meshes whose devices several processes hold, the last three with `model` across them, two of
them in disorder.
"""


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


def segments_of(batch, row):
    for number in range(1, batch["segments"][row].max() + 1):
        yield batch["segments"][row] == number


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


def test_of_a_question_the_answer_and_its_end_alone_are_learned(tokenizer):
    """In the very tokens that a prompt and its continuation have; one of its answers on each
    visit; several to a row, each with its own frames.
    """
    it = iterator("flamingo", "questions", tokenizer, source=questions(6), batch_size=1)
    told, packed = {}, False
    for _ in range(40):
        batch = next(it)
        packed |= batch["segments"].max() > 1
        for mask in segments_of(batch, 0):
            tokens, learned, index = (
                batch[name][0][mask] for name in ("tokens", "loss_mask", "media_index")
            )
            number = int(tokenizer.decode(tokens.tolist()).split(" n")[1].split()[0])
            example = BenchmarkExample(
                "",
                Visual(np.zeros((1, SIZE, SIZE, 3), np.uint8)),
                ("",),
                questions(6)[number]["question"],
            )
            prompt = tokenise(few_shot(example, [], [], QUESTION), tokenizer)
            answer = tokens[len(prompt.tokens) : -2]
            np.testing.assert_array_equal(tokens[: len(prompt.tokens)], prompt.tokens)
            np.testing.assert_array_equal(index[: len(prompt.tokens)] >= 0, prompt.media_index >= 0)
            assert tokens[-2:].tolist() == [tokenizer.eoc, tokenizer.eos]
            np.testing.assert_array_equal(
                np.flatnonzero(learned), np.arange(len(prompt.tokens), len(tokens) - 1)
            )
            told.setdefault(number, set()).add(tokenizer.decode(answer.tolist()))
            place = batch["visuals"][0][index[1]]
            reds = (
                batch["images"][place][batch["frame_mask"][place]][:, 0, 0, 0].astype(int)
                - 7 * number
            )
            assert (
                reds.tolist() == [0]
                if number % 2 == 0
                else reds[0] in (0, 1, 2) and reds[1] == reds[0] + 1
            )
    it.close()
    assert packed and told == {
        number: {" red", " blue a"} if number % 2 else {" red"} for number in range(6)
    }


def asked(count=7, about=3):
    """`about` questions about one image after another."""
    return [
        questions(count)[i] | {"frames": [numbered_image(i // about)], "answers": ["red"]}
        for i in range(count)
    ]


def test_questions_about_one_image_share_it_in_a_row(tokenizer):
    """Three of them fit a row, and the seventh is alone with its image; each is packed as it
    would be with an image of its own.
    """
    longest = int(measure(asked(), "questions", tokenizer, QUESTION.text).tokens.max())
    options = dict(source=asked(), batch_size=1, max_length=3 * longest, visuals=1, frames=1)
    apart = {}
    for batch in take(iterator("flamingo", "questions", tokenizer, pack=False, **options), 7):
        tokens = batch["tokens"][0][batch["segments"][0] == 1]
        apart[tokens.tobytes()] = (
            batch["loss_mask"][0][: len(tokens)],
            batch["media_index"][0][: len(tokens)],
            batch["images"],
        )
    it = iterator("flamingo", "questions", tokenizer, **options)
    assert it.summary()["rows"] == 3
    numbers = []
    for batch in take(it, 3):
        numbers.append(int(batch["segments"].max()))
        assert (
            batch["images"].shape[0] == 1
            and batch["frame_mask"].all()
            and batch["visuals"].tolist() == [[0]]
        )
        for mask in segments_of(batch, 0):
            learned, index, images = apart.pop(batch["tokens"][0][mask].tobytes())
            np.testing.assert_array_equal(batch["loss_mask"][0][mask], learned)
            np.testing.assert_array_equal(batch["media_index"][0][mask], index)
            np.testing.assert_array_equal(batch["images"], images)
    assert sorted(numbers) == [1, 3, 3] and not apart
    # Two fit a row: three of them are parted as evenly as can be.
    short = iterator(
        "flamingo", "questions", tokenizer, **(options | {"max_length": 2 * longest, "visuals": 2})
    )
    assert (
        short.summary()["too_long"] == 0
        and max(int(batch["segments"].max()) for batch in take(short, 6)) == 2
    )


def test_contrastive_texts_of_questions_are_those_of_their_image(tokenizer):
    source = asked(12)
    texts, numbers = set(), []
    for batch in take(
        iterator(
            "contrastive",
            "questions",
            tokenizer,
            source=source,
            batch_size=4,
            prompt="{question}",
        ),
        12,
    ):
        for row in range(4):
            ids = batch["tokens"][row][batch["mask"][row]]
            assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos
            text = tokenizer.decode(ids.tolist())
            texts.add(text)
            number = int(batch["images"][row, 0, 0, 0])
            numbers.append(number)
            asks = {int(word.split("n")[1]) // 3 for word in text.split() if word[-1].isdigit()}
            assert asks == {number} and text.endswith(" red")
    assert sorted(numbers) == sorted([0, 1, 2, 3] * 12) and len(texts) > 8


def test_a_bad_image_blanks_all_questions_that_share_it(tokenizer):
    source = broken(asked(), {0, 1, 2})
    it = iterator(
        "flamingo",
        "questions",
        tokenizer,
        source=source,
        batch_size=1,
        max_length=200,
        visuals=2,
        frames=1,
    )
    lost = 0
    for batch in take(it, it.summary()["rows"]):
        for mask in segments_of(batch, 0):
            text = tokenizer.decode(batch["tokens"][0][mask].tolist())
            blank = int(text.split(" n")[1].split()[0]) < 3
            lost += blank
            read = masked(batch)
            assert (
                read["loss_mask"][0][mask].any() != blank
                and (read["media_index"][0][mask] >= 0).any() != blank
            )
    assert lost == 3 and it.summary()["failed"] == ["question0"]


def test_questions_as_text_are_the_same_words_without_a_visual(tokenizer):
    it = iterator(
        "language_modelling",
        "questions",
        tokenizer,
        source=questions(4),
        batch_size=1,
        visuals=0,
        max_length=256,
    )
    batch = next(it)
    assert batch["segments"].max() == 4 == it.summary()["records"]
    it.close()
    for mask in segments_of(batch, 0):
        tokens = batch["tokens"][0][mask]
        text = tokenizer.decode(tokens.tolist())
        number = int(text.split(" n")[1].split()[0])
        assert text in {
            f"Question: {questions(4)[number]['question']} Answer: {answer}"
            for answer in ("red", "blue a")
        }
        assert (
            tokens[0] == tokenizer.bos
            and tokens[-1] == tokenizer.eos
            and batch["loss_mask"][0][mask].tolist() == [False] + [True] * (len(tokens) - 1)
        )


def test_a_question_too_long_for_a_row_is_left_out_and_counted(tokenizer):
    source = [*questions(5), questions(6)[5] | {"question": "star " * 100}]
    it = iterator("flamingo", "questions", tokenizer, source=source, batch_size=1)
    assert (it.summary()["too_long"], it.summary()["cut"]) == (1, 0)
    it.close()
    other = iterator(
        "flamingo",
        "questions",
        tokenizer,
        source=questions(2),
        prompt="{question}",
        batch_size=1,
    )
    assert tokenizer.decode(next(other)["tokens"][0].tolist()).startswith(
        ("<image>n0 star or circle? red", "<image>n1 star or circle? ")
    )
    other.close()
    with pytest.raises(UserError, match="has no {question} in it"):
        iterator("flamingo", "questions", tokenizer, prompt="Answer:")


def test_lengths_of_questions_are_kept_by_prompt(tokenizer, tmp_path):
    sizes = [
        int(
            load_or_measure(questions(2), "questions", tokenizer, tmp_path, "train", prompt).tokens[
                0
            ]
        )
        for prompt in ("{question}", "a {question}")
    ]
    assert (
        sizes[1] == sizes[0] + len(tokenizer.encode("a n0")) - len(tokenizer.encode("n0"))
        and len(list(tmp_path.iterdir())) == 2
    )


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


def broken(source, numbers):
    """The same records with the last image of some cut short."""
    out = []
    for number, record in enumerate(source):
        record = dict(record)
        if number in numbers:
            for name in {"image", "images", "frames"} & record.keys():
                record[name] = (
                    record[name][:40] if name == "image" else [p[:40] for p in record[name]]
                )
        out.append(record)
    return out


def masked(batch):
    """As the task reads it."""
    return jax.tree.map(np.asarray, without_failed(batch))


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
    make = lambda host_shard: make_held_out(
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
