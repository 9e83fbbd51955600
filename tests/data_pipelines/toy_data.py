"""Toy datasets in memory, a tokenizer for their words, and batches of them."""

import dataclasses
import io

import jax
import numpy as np
import sentencepiece
from PIL import Image

from data_pipelines.batches import make_iterator
from data_pipelines.readers import Readers
from flamingo_jax.experiment import DatasetConfig
from flamingo_jax.partitioning.host_shard import WHOLE_BATCH
from flamingo_jax.partitioning.mesh import BY_VISUAL
from flamingo_jax.processing.tokenizer import SentencePieceTokenizer, Tokenizer
from flamingo_jax.tasks.flamingo import mask_unreadable

MEAN = (0.2, 0.4, 0.6)


SIZE = 8


WORDS = ["red", "blue", "green", "circle", "square", "star", "left", "right", "a", "the"]


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


def segments_of(batch, row):
    for number in range(1, batch["segments"][row].max() + 1):
        yield batch["segments"][row] == number


def shared_questions(count=7, about=3):
    """`about` questions about one image after another."""
    return [
        questions(count)[i] | {"frames": [numbered_image(i // about)], "answers": ["red"]}
        for i in range(count)
    ]


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
    return jax.tree.map(np.asarray, mask_unreadable(batch))
