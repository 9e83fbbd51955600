"""The engine and a real, tiny Flamingo against its plain forward pass on whole rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.inference import device_model, programs
from flamingo_jax.inference.array_cache import ArrayCache
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.inference.prompts import Prompt, bucket_length, common_prefix, tokenise
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.pytrees import from_flat, to_flat
from tests.inference.tiny_models import make_loaded

RNG = np.random.default_rng(0)
IMAGES = [Visual(RNG.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)) for _ in range(3)]
CLIP = Visual(RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
PROMPTS: list[Prompt] = [
    [IMAGES[0], "Output: a red circle", IMAGES[1], "Output:"],
    [IMAGES[2], "Output:"],
    ["this is a", CLIP, "Output: a star", IMAGES[1], "Output: a blue"],
]
LENGTH = 48


@pytest.fixture(scope="module")
def loaded() -> LoadedFlamingo:
    return make_loaded()


@pytest.fixture(scope="module")
def engine(loaded: LoadedFlamingo) -> Engine:
    return Engine(loaded)


@pytest.fixture(scope="module")
def forward(loaded: LoadedFlamingo):
    """(prompt, tokens after it) -> log-probabilities [n, V] of the whole row, by one pass with
    no cache.
    """
    graph, state = nnx.split(loaded.model)

    @jax.jit
    def run(state, tokens, segments, index, images, mask, visuals):
        model = nnx.merge(graph, state)
        logits = model(
            tokens,
            jnp.arange(LENGTH)[None],
            segments,
            index,
            model.encode_visuals(images, mask),
            visuals,
        )
        return jax.nn.log_softmax(logits[0])

    def whole(prompt: Prompt, after: list[int], seen: bool = True) -> np.ndarray:
        made = tokenise(prompt, loaded.tokenizer)
        ids = [*made.tokens.tolist(), *after]
        tokens, segments, index = (np.zeros((1, LENGTH), np.int32) for _ in range(3))
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        index[0, : len(ids)] = (
            [*made.media_index.tolist(), *[made.media_index[-1]] * len(after)] if seen else -1
        )
        images, mask = np.zeros((2, 4, 32, 32, 3), np.uint8), np.zeros((2, 4), bool)
        for place, visual in enumerate(made.visuals):
            images[place, : len(visual.frames)], mask[place, : len(visual.frames)] = (
                visual.frames,
                True,
            )
        visuals = np.array([[0, 1 if len(made.visuals) > 1 else -1]])
        return np.asarray(run(state, tokens, segments, index, images, mask, visuals))[
            len(made.tokens) - 1 : len(ids)
        ]

    return whole


def test_greedy_generation_equals_running_the_whole_row_again_and_again(
    engine: Engine, forward
) -> None:
    tokenizer = engine.tokenizer
    never = [tokenizer.bos, tokenizer.pad, *tokenizer.image_tag_ids]
    for prompt, made in zip(
        PROMPTS, engine.generate(PROMPTS, DecodingConfig(max_tokens=6)), strict=True
    ):
        after: list[int] = []
        score = 0.0
        while len(after) < 6 and not {tokenizer.eoc, tokenizer.eos} & set(after):
            rows = forward(prompt, after)[-1].copy()
            rows[never] = -np.inf
            after.append(int(rows.argmax()))
            score += float(rows.max())
        assert made.text == tokenizer.decode(after)
        assert made.score == pytest.approx(score, abs=1e-4)
        assert made.finished == (after[-1] in (tokenizer.eoc, tokenizer.eos))


def test_a_beam_is_no_worse_than_greedy_and_its_score_is_that_of_the_whole_row(
    engine: Engine, forward
) -> None:
    greedy = engine.generate(PROMPTS, DecodingConfig(max_tokens=6))
    for prompt, one, made in zip(
        PROMPTS,
        greedy,
        engine.generate(PROMPTS, DecodingConfig(max_tokens=6, beam_size=3)),
        strict=True,
    ):
        if made.finished and one.finished:
            assert made.score >= one.score - 1e-4
        candidates = engine.log_likelihoods([prompt], [[made.text]], close=made.finished)
        # The text may be cut into other pieces than those written: then it says nothing about
        # the score.
        if engine.tokenizer.decode(engine.tokenizer.encode(made.text)) == made.text and np.isclose(
            candidates[0][0], made.score, atol=1e-3
        ):
            return
    pytest.fail("no beam's score was confirmed")


def test_log_likelihoods_equal_those_of_whole_rows(engine: Engine, forward) -> None:
    candidates = [
        [" a red circle", " a star"],
        [" blue"],
        [" circle", " a", " star at the top"],
    ]
    tokenizer = engine.tokenizer
    for prompt, texts, scores in zip(
        PROMPTS, candidates, engine.log_likelihoods(PROMPTS, candidates), strict=True
    ):
        for text, score in zip(texts, scores, strict=True):
            ids = [*tokenizer.encode(text), tokenizer.eoc]
            rows = forward(prompt, ids)
            assert score == pytest.approx(
                sum(rows[i, token] for i, token in enumerate(ids)), abs=1e-3
            )


def test_without_visuals_prompts_are_read_as_if_images_were_taken_away(
    loaded: LoadedFlamingo, forward
) -> None:
    blind = Engine(loaded, with_visuals=False)
    ids = [*loaded.tokenizer.encode(" a star"), loaded.tokenizer.eoc]
    scores = blind.log_likelihoods(PROMPTS, [[" a star"]] * 3)
    for prompt, score in zip(PROMPTS, scores, strict=True):
        rows = forward(prompt, ids, seen=False)
        assert score[0] == pytest.approx(
            sum(rows[i, token] for i, token in enumerate(ids)), abs=1e-3
        )


def test_answers_do_not_depend_on_the_batch(engine: Engine) -> None:
    many = engine.generate(
        [*PROMPTS, *PROMPTS[::-1]], DecodingConfig(max_tokens=6, temperature=0.0)
    )
    assert [one.text for one in many[:3]] == [one.text for one in many[5:2:-1]]
    assert many[1].text == engine.generate([PROMPTS[1]], DecodingConfig(max_tokens=6))[0].text


def test_each_different_image_is_encoded_once(
    loaded: LoadedFlamingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flamingo_jax.inference import programs as module

    counted = []
    encode = module.encode_visuals
    monkeypatch.setattr(
        module,
        "encode_visuals",
        lambda graph, state, images, mask: (
            counted.append(int(mask.any(1).sum())) or encode(graph, state, images, mask)
        ),
    )
    engine = Engine(loaded)
    copies = [
        [Visual(part.frames.copy()) if isinstance(part, Visual) else part for part in prompt]
        for prompt in PROMPTS
    ]
    engine.generate([*PROMPTS, *copies], DecodingConfig(max_tokens=2, beam_size=3))
    engine.log_likelihoods(PROMPTS, [[" a", " red"]] * 3)
    assert sum(counted) == 4


def test_shots_that_all_prompts_begin_with_are_read_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the texts and scores of prompts that are read whole."""
    shots = [
        part
        for number, colour in enumerate(["red", "blue", "green", "blue"])
        for part in (IMAGES[number % 3], f"Output: a {colour} circle at the top left")
    ]
    ends = [[IMAGES[0], "Output:"], [IMAGES[1], "Output: a"], [IMAGES[1], "Question: what"]]
    prompts = [[*shots, *end] for end in ends]
    shared = common_prefix([tokenise(prompt, engine.tokenizer) for prompt in prompts])
    alone = tokenise(shots, engine.tokenizer)
    # The <EOC> before the next image, too.
    assert shared == len(alone.tokens) + 1 > device_model.LEAST_PREFIX
    read: list[tuple[int, ...]] = []
    inner = programs.read_prompts_prefix

    def spy(graph, state, prompts, media):
        read.append((*prompts.tokens.shape, int(prompts.lengths[0])))
        return inner(graph, state, prompts, media)

    monkeypatch.setattr(programs, "read_prompts_prefix", spy)

    def ask() -> tuple[list[str], list[float]]:
        made = [
            *engine.generate(prompts, DecodingConfig(max_tokens=4)),
            *engine.generate(prompts, DecodingConfig(max_tokens=4, beam_size=3)),
        ]
        scores = engine.log_likelihoods(prompts, [[" red", " a star"]] * 3)
        return [one.text for one in made], [one.score for one in made] + np.concatenate(
            scores
        ).tolist()

    texts, scores = ask()
    assert read == [(1, bucket_length(shared), shared)] * 3
    monkeypatch.setattr(device_model, "LEAST_PREFIX", 1000)
    whole_texts, whole_scores = ask()
    assert len(read) == 3 and texts == whole_texts
    np.testing.assert_allclose(scores, whole_scores, atol=1e-4)


def test_features_are_unit_vectors_that_do_not_depend_on_padding(
    loaded: LoadedFlamingo, engine: Engine
) -> None:
    features = engine.features([*IMAGES, CLIP])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(Engine(loaded).features([CLIP])[0], features[3], atol=1e-5)


def test_an_encoders_digest_is_of_its_own_parameters(loaded: LoadedFlamingo) -> None:
    def changed(part: str) -> str:
        """The digest where one number of the first parameter of `part` is another."""
        graph, state = nnx.split(loaded.model)
        flat = to_flat(state)
        name = min(name for name in flat if name.startswith(f"{part}/"))
        flat[name] = flat[name].at[(0,) * flat[name].ndim].add(1.0)
        model = nnx.merge(graph, nnx.State(from_flat(flat)))
        return Engine(dataclasses.replace(loaded, model=model)).encoder_digest

    own = Engine(loaded).encoder_digest
    assert changed("language_model") == own and changed("resampler") == own
    assert changed("vision_encoder") != own


def test_each_features_are_computed_once(
    loaded: LoadedFlamingo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every number of shots the same support is asked for again."""
    from flamingo_jax.inference import programs as module

    counted, features = [], module.mean_features

    def counting(graph, state, images, mask):
        counted.append(int(mask.any(1).sum()))
        return features(graph, state, images, mask)

    monkeypatch.setattr(module, "mean_features", counting)
    engine = Engine(loaded)
    first = engine.features([*IMAGES, CLIP])
    again = engine.features([CLIP, Visual(IMAGES[0].frames.copy()), CLIP])
    assert sum(counted) == 4
    np.testing.assert_array_equal(again, first[[3, 0, 3]])


def test_arrays_of_longest_ago_are_let_go() -> None:
    kept, asked = ArrayCache(3 * 8), []

    def get(*names: bytes) -> None:
        def make(missing: list[bytes]) -> dict[bytes, np.ndarray]:
            asked.append(missing)
            return {name: np.frombuffer(8 * name, np.uint8) for name in missing}

        found = kept.get(names, make)
        assert {name: array.tobytes() for name, array in found.items()} == {n: 8 * n for n in names}

    get(b"a", b"b")
    get(b"a", b"c")
    get(b"d")
    get(b"a", b"c")
    get(b"b", b"x", b"y", b"z")
    assert asked == [[b"a", b"b"], [b"c"], [b"d"], [b"b", b"x", b"y", b"z"]]


def test_nothing_asked_is_nothing_said(engine: Engine) -> None:
    assert engine.log_likelihoods([], []) == engine.generate([], DecodingConfig()) == []
    assert engine.features([]).shape == (0, 0)
    empty = engine.log_likelihoods(PROMPTS[:2], [[], []])
    assert [scores.shape for scores in empty] == [(0,), (0,)]
    some, none = engine.log_likelihoods(PROMPTS[:2], [[" a"], []])
    assert some.shape == (1,) and none.shape == (0,)
    with pytest.raises(UserError, match="3 prompts and 1 lists of candidates"):
        engine.log_likelihoods(PROMPTS, [[" a"]])


def test_visuals_of_another_size_are_refused(engine: Engine) -> None:
    large = Visual(np.zeros((1, 32, 40, 3), np.uint8))
    for ask in (
        lambda: engine.generate([[large, "Output:"]], DecodingConfig()),
        lambda: engine.log_likelihoods([[large]], [[" a"]]),
        lambda: engine.features([IMAGES[0], large]),
    ):
        with pytest.raises(UserError, match="40 x 32 pixels, but the model takes 32 x 32"):
            ask()
