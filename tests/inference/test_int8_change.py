"""What the int8 benchmark says of a model, against numpy in float64."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.inference.int8_change import compare, memory_of, text_rows
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.quantised import quantise_part
from flamingo_jax.pytrees import to_flat
from tests.inference.tiny_models import WORDS, make_export, make_tokenizer
from tests.launch import commands
from tests.models.filling import filled
from tests.models.test_int8 import LLAMA

RNG = np.random.default_rng(0)


def test_it_is_the_change_of_the_distributions() -> None:
    before = filled(lambda rngs: LanguageModel(LLAMA, rngs=rngs))
    after = nnx.merge(*nnx.split(before))
    quantise_part(after)
    tokens = RNG.integers(0, 24, (2, 9)).astype(np.int32)
    segments = np.array([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2], np.int32)
    places = np.array([[*range(9)], [*range(4), *range(3), 0, 0]], np.int32)
    mask = RNG.random((2, 9)) < 0.8
    batch = {"tokens": tokens, "positions": places, "segments": segments, "loss_mask": mask}
    found = compare(before, after, [batch, batch])

    run = jax.jit(lambda model: model(tokens, places, segments))
    old, new = (np.asarray(run(model), np.float64)[:, :-1] for model in (before, after))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (old, new))
    counts = mask[:, 1:] & (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    divergence = (np.exp(p) * (p - q)).sum(-1)[counts]
    losses = [-np.take_along_axis(x, tokens[:, 1:, None], -1)[..., 0][counts] for x in (p, q)]
    assert found.tokens == 2 * counts.sum()
    np.testing.assert_allclose(
        [found.perplexity, found.int8_perplexity],
        [np.exp(loss.mean()) for loss in losses],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        [found.divergence, found.divergence_99, found.largest_divergence],
        [divergence.mean(), np.quantile([*divergence] * 2, 0.99), divergence.max()],
        rtol=1e-2,
        atol=1e-6,
    )
    largest = np.abs(old - new)[counts].max()
    np.testing.assert_allclose(found.largest_difference, largest, rtol=1e-3)
    assert found.same_choice == (old.argmax(-1) == new.argmax(-1))[counts].mean()
    assert 0 < found.divergence < 0.05


def test_memory_is_that_of_the_arrays() -> None:
    model = filled(lambda rngs: LanguageModel(LLAMA, rngs=rngs))
    count = sum(array.size for array in to_flat(nnx.state(model)).values())
    quantise_part(model)
    found, held = memory_of(model), to_flat(nnx.state(model)).values()
    assert found.parameters == count and found.bfloat16 == 2 * count
    assert found.int8 == sum(array.size * jnp.dtype(array.dtype).itemsize for array in held)


def test_rows_are_the_text_from_its_beginning_on() -> None:
    tokenizer = make_tokenizer()
    text = " ".join(RNG.choice(WORDS, 40))
    tokens = tokenizer.encode(text)
    rows = [row["tokens"][0].tolist() for row in text_rows(tokenizer, [text], 8, 1000)]
    assert {len(row) for row in rows} == {8} and {row[0] for row in rows} == {tokenizer.bos}
    joined = [token for row in rows for token in row[1:]]
    assert joined == tokens[: len(joined)] and len(tokens) - len(joined) < 7
    short = [row for row in text_rows(tokenizer, [text, text], 8, 30)]
    assert len(short) == 4


def test_the_command_prints_what_it_measured(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    make_export(tmp_path / "export")
    (tmp_path / "a.txt").write_text(" ".join(RNG.choice(WORDS, 60)))

    def call(**values: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            command = commands.load("benchmark")
            patch.setattr(command.command, "given_flags", lambda: {"model", *values})
            for place, value in {"MODEL": str(tmp_path / "export"), **values}.items():
                patch.setattr(command, place.upper(), commands.flag(value))
            return command.main("int8")

    assert call(TEXTS=[str(tmp_path)], ROW_LENGTH=8, TOKENS=40, JSON=True) == 0
    found = json.loads(capsys.readouterr().out)
    memory = found["memory"]["language_model"]
    assert memory["ratio"] == memory["int8"] / memory["bfloat16"] < 0.75
    assert found["change"]["tokens"] == 35 and abs(found["change"]["rise"]) < 0.05
    assert call(TEXTS=[str(tmp_path)], ROW_LENGTH=8, TOKENS=40) == 0
    assert "perplexity in int8" in capsys.readouterr().out
    (tmp_path / "short").write_text("a red")
    with pytest.raises(UserError, match="has no token to predict"):
        call(TEXTS=[str(tmp_path / "short")], ROW_LENGTH=8, TOKENS=40)
    with pytest.raises(UserError, match="cannot be read as text"):
        call(TEXTS=[str(tmp_path / "missing.txt")])
