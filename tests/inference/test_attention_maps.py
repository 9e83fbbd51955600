"""What a model looked at: probabilities as `score` gives them, attention as its parts have it."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import flamingo_jax as fj
from flamingo_jax.inference.attention_maps import ALTERNATIVES, AttentionMaps, token_texts
from flamingo_jax.models.packing import PackedText
from tests.inference.tiny_models import make_loaded

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
FRAMES = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
PROMPT = [fj.Image(IMAGE), "Output: a red star", fj.Video(FRAMES), "Output:"]
ANSWER = " a blue circle"


@pytest.fixture(scope="module")
def model() -> fj.Model:
    loaded = make_loaded()
    return fj.Model(loaded.model, loaded.tokenizer)


@pytest.fixture(scope="module")
def maps(model: fj.Model) -> AttentionMaps:
    return model.attention_maps(PROMPT, ANSWER)


def test_tokens_have_the_probabilities_that_score_sums(
    model: fj.Model, maps: AttentionMaps
) -> None:
    assert "".join(token.text for token in maps.tokens) == ANSWER
    assert [token.token for token in maps.tokens] == model.tokenizer.encode(ANSWER)
    scored = model.score(PROMPT, [ANSWER], close=False).log_likelihoods[0]
    assert sum(token.log_probability for token in maps.tokens) == pytest.approx(scored, abs=1e-4)
    whole = model([[*PROMPT, ANSWER]])[0]
    before = len(model.tokenise(PROMPT)[0].tokens) - 1
    log_probabilities = np.asarray(jax.nn.log_softmax(whole))
    suppressed = {model.tokenizer.bos, model.tokenizer.pad, *model.tokenizer.image_tag_ids}
    for place, others in enumerate(maps.alternatives):
        row = log_probabilities[before + place]
        order = [int(n) for n in np.argsort(-row) if n not in suppressed][:ALTERNATIVES]
        assert [other.token for other in others] == order
        values = [other.log_probability for other in others]
        np.testing.assert_allclose(values, row[order], atol=1e-4)


def test_the_last_visual_is_read_and_no_other(maps: AttentionMaps) -> None:
    assert maps.media_index.tolist() == [1] * len(maps.tokens)
    assert [len(visual.frames) for visual in maps.visuals] == [1, 3]
    assert maps.cross_attention.shape == (2, len(maps.tokens), 2, 4)
    assert not maps.cross_attention[:, :, 0].any()
    np.testing.assert_allclose(maps.cross_attention[:, :, 1].sum(-1), 1.0, rtol=1e-5)


def test_a_heat_map_is_the_attention_through_the_resampler(
    model: fj.Model, maps: AttentionMaps
) -> None:
    """Against the model's own parts, visual by visual and without any padding."""
    flamingo = model.flamingo
    tokens, grids = [], []
    for visual in maps.visuals:
        images, mask = visual.frames[None], np.ones((1, len(visual.frames)), bool)
        features = flamingo.encode_images([images])[0]
        tokens.append(flamingo.encode_visuals(images, mask)[0])
        grids.append(np.asarray(flamingo.resampler.rollout(features, mask)[0], np.float64))
    prompt = model.tokenise(PROMPT)[0]
    ids = np.concatenate([prompt.tokens, model.tokenizer.encode(ANSWER)])[None]
    index = np.concatenate([prompt.media_index, [1] * len(maps.tokens)])[None]
    text = PackedText(
        ids, np.arange(ids.size)[None], np.ones_like(ids), index, np.array([[0, 1]], np.int32)
    )
    places = len(prompt.tokens) - 1 + np.arange(len(maps.tokens))[None]
    graph, state = nnx.split(flamingo)
    _, weights = jax.jit(
        lambda s: nnx.merge(graph, s).cross_attention(text, np.stack(tokens), places)
    )(state)
    np.testing.assert_allclose(maps.cross_attention, weights[:, 0], atol=1e-5)
    side = int(np.sqrt(grids[1].shape[-1]))
    for token in range(len(maps.tokens)):
        for block in (None, 0, 1):
            found = maps.heat(token, 1, block)
            chosen = weights[:, 0, token, 1]
            mean = np.asarray(chosen).mean(0) if block is None else np.asarray(chosen)[block]
            expected = sum(w * grid for w, grid in zip(mean, grids[1], strict=True))
            assert found.shape == (3, side, side)
            np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-5)
            assert found.sum() == pytest.approx(maps.shares(token, block)[1], abs=1e-5)
        assert not maps.heat(token, 0).any()


def test_ids_of_a_completion_are_looked_at_as_they_were_generated(model: fj.Model) -> None:
    completion = model.generate(PROMPT, max_tokens=5, beam_size=1)
    found = model.attention_maps(PROMPT, completion.tokens)
    assert tuple(token.token for token in found.tokens) == completion.tokens
    for token, others in zip(found.tokens, found.alternatives, strict=True):
        assert token.token == others[0].token


def test_without_a_visual_nothing_is_looked_at(model: fj.Model) -> None:
    found = model.attention_maps("this is a", " star")
    assert found.media_index.tolist() == [-1] * len(found.tokens)
    assert found.cross_attention.shape[2:] == (0, 4) and not found.grids
    scored = model.score("this is a", [" star"], close=False).log_likelihoods[0]
    assert sum(token.log_probability for token in found.tokens) == pytest.approx(scored, abs=1e-4)
    before = model.attention_maps(["this is a", fj.Image(IMAGE)], " star")
    assert before.media_index.tolist() == [0] * len(before.tokens)


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    class Bytes:
        def decode(self, ids: Any) -> str:
            return bytes(ids).decode(errors="replace")

    texts = token_texts(list("a漢b".encode()), Bytes())  # type: ignore[arg-type]
    assert texts == ["a", "", "", "漢", "b"]
    assert token_texts(list("a漢".encode())[:3], Bytes()) == ["a", "", "�"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "answer", "said"),
    [
        ([PROMPT, PROMPT], ANSWER, "of one prompt, but a batch of 2 was given"),
        (PROMPT, "", "the answer has no tokens"),
        (PROMPT, [5, 10_000], "token id 10000, but the model's go from 0 to"),
        ([" a red circle" * 8000], ANSWER, "16384 are the most in all"),
    ],
)
def test_a_mistake_is_one_sentence(model: fj.Model, prompt: Any, answer: Any, said: str) -> None:
    with pytest.raises(fj.UserError, match=said) as error:
        model.attention_maps(prompt, answer)
    assert "\n" not in str(error.value)
