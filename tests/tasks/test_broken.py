"""What is not finite reaches what it may reach, and nothing else: neither its values nor its
gradient, since 0 x NaN is NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    ContrastiveConfig,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    TextEncoderConfig,
    VisionConfig,
)
from flamingo_jax.models import nfnet
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.resamplers import PerceiverResampler
from flamingo_jax.models.text_encoder import TextEncoder
from flamingo_jax.tasks.contrastive import contrastive_loss
from flamingo_jax.tasks.flamingo import FlamingoTask
from tests.models.filling import ONE_STAGE, filled, filled_dual_encoder
from tests.tasks.logits import token_loss

BROKEN = [np.nan, np.inf]
CONFIG = FlamingoConfig(
    vision=VisionConfig(variant="tiny", image_size=32),
    language_model=LanguageModelConfig(
        vocab_size=9,
        layers=2,
        width=8,
        attention=AttentionConfig(heads=2, head_width=4),
        feed_forward=FeedForwardConfig(width=12),
    ),
    resampler=ResamplerConfig(
        layers=1, width=8, heads=2, head_width=4, latents=2, frames=2, feed_forward=12
    ),
    conditioning=ConditioningConfig(
        xattn_every=2,
        heads=2,
        head_width=4,
        feed_forward=12,
    ),
)
RNG = np.random.default_rng(0)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0]])
# Text before the first image, text that looks at it, another page; a row whose image is blank.
MEDIA_INDEX = np.array([[-1, -1, 0, 0, 0, -1, 1, 1], [-1, 0, 0, 0, 0, 0, -1, -1]])
REACHED = (MEDIA_INDEX == 0) & (np.arange(2) == 0)[:, None]
"""What the first row's first image reaches."""


def batch() -> dict[str, jax.Array]:
    """Two visuals a row with two frames each: the first row's second has one, the second row
    has one visual.
    """
    masks = [[True, True], [True, False], [True, True], [False, False]]
    return {
        "tokens": jnp.asarray(RNG.integers(0, 10, SEGMENTS.shape), jnp.int32),
        "positions": jnp.asarray(np.tile(np.arange(8), (2, 1)), jnp.int32),
        "segments": jnp.asarray(SEGMENTS, jnp.int32),
        "media_index": jnp.asarray(MEDIA_INDEX, jnp.int32),
        "loss_mask": jnp.ones(SEGMENTS.shape, bool),
        "visuals": jnp.asarray([[0, 1], [2, -1]], jnp.int32),
        "frame_mask": jnp.asarray(masks),
        "features": jnp.asarray(RNG.standard_normal((4, 2, 4, 160)), jnp.float32),
    }


BATCH = batch()
TEXT = {k: v for k, v in batch().items() if k not in ("visuals", "frame_mask", "features")}


@pytest.fixture(scope="module")
def model() -> Flamingo:
    return filled(lambda rngs: Flamingo(CONFIG, rngs=rngs))


@pytest.fixture(scope="module", params=["alone", "with text"])
def slope(model: Flamingo, request: pytest.FixtureRequest) -> Any:
    """(batch) -> gradient of all that trains, loss."""
    graph, lm, trained = nnx.split(model, lambda path, _: path[0] == "language_model", ...)
    task = FlamingoTask("token_mean")

    def total(trained: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(graph, lm, trained)
        if request.param == "with text":
            text = TEXT | {"media_index": jnp.full((2, 8), -1, jnp.int32)}
            return task.losses(model, {"seen": batch, "text": text}, None)["seen"].total
        return task.losses(model, {"seen": batch}, None)["seen"].total

    compiled = jax.jit(jax.value_and_grad(total))
    return lambda batch: compiled(trained, batch)


def same(found: Any, expected: Any) -> None:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_broken_image_has_no_part_in_the_loss_of_text_that_does_not_look(slope: Any) -> None:
    """Nor in its gradient; text that looks has no finite loss, which the update takes for a
    step to skip.
    """
    elsewhere = BATCH | {"loss_mask": jnp.asarray(~REACHED)}
    expected = slope(elsewhere)
    for value in BROKEN:
        features = BATCH["features"].at[0, 1, 2, 3].set(value)
        same(slope(elsewhere | {"features": features}), expected)
        assert np.isnan(slope(BATCH | {"features": features})[0])


def test_what_is_masked_has_no_part_in_anything(slope: Any) -> None:
    """A padded frame and a blank's frames, whatever they hold."""
    expected = slope(BATCH)
    for value in BROKEN:
        features = BATCH["features"].at[1, 1].set(value).at[3].set(value)
        same(slope(BATCH | {"features": features}), expected)


@pytest.mark.parametrize("value", BROKEN)
def test_logits_are_nan_where_a_broken_visual_reaches_and_nowhere_else(
    model: Flamingo, value: float
) -> None:
    graph, state = nnx.split(model)
    tokens = jnp.asarray(RNG.standard_normal((4, 2, 8)), jnp.float32)
    names = ("tokens", "positions", "segments", "media_index")

    @jax.jit
    def forward(tokens: jax.Array, visuals: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(*(BATCH[name] for name in names), tokens, visuals)

    expected = forward(tokens, BATCH["visuals"])
    found = forward(tokens.at[0, 1, 5].set(value), BATCH["visuals"])
    np.testing.assert_array_equal(np.isnan(found).all(-1), REACHED)
    np.testing.assert_array_equal(found[~REACHED], expected[~REACHED])
    # An empty place, -1, is the last visual to a gather.
    found = forward(tokens.at[3].set(value), BATCH["visuals"])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", BROKEN)
def test_decoding_goes_on_in_the_rows_that_do_not_look(model: Flamingo, value: float) -> None:
    graph, state = nnx.split(model)
    tokens = jnp.asarray(RNG.standard_normal((4, 2, 8)), jnp.float32)

    @jax.jit
    def decode(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, state)
        cache, media = model.init_cache(2, 8), model.prepare_media(tokens)
        logits = []
        for part in (slice(0, 5), slice(5, 6)):
            given = (BATCH[name][:, part] for name in ("tokens", "positions", "media_index"))
            found, cache = model.decode(*given, media, BATCH["visuals"], cache)
            logits.append(found)
        return logits[0], logits[1]

    first, second = decode(tokens.at[0, 0, 0].set(value).at[3].set(value))
    expected = decode(tokens)
    # The first row's image is broken: what comes after it reads what it made of the text.
    assert np.isnan(first[0, 2:]).all() and np.isnan(second[0]).all()
    np.testing.assert_array_equal(first[1], expected[0][1])
    np.testing.assert_array_equal(second[1], expected[1][1])


def test_the_resampler_keeps_visuals_apart() -> None:
    module = filled(lambda rngs: PerceiverResampler(CONFIG.resampler, 6, rngs=rngs))
    graph, state = nnx.split(module)
    features = jnp.asarray(RNG.standard_normal((3, 2, 4, 6)), jnp.float32)
    masks = jnp.asarray([[True, False], [True, True], [False, False]])

    @jax.jit
    def run(features: jax.Array) -> tuple[jax.Array, Any]:
        def read(state: Any) -> tuple[jax.Array, jax.Array]:
            tokens = nnx.merge(graph, state)(features, masks)
            return jnp.square(tokens[jnp.array([0, 2])]).sum(), tokens

        gradient, tokens = jax.grad(read, has_aux=True)(state)
        return tokens, gradient

    expected, slope = run(features)
    for value in BROKEN:
        found, same_slope = run(
            features.at[0, 1, 1].set(value).at[1, 0, 0, 0].set(value).at[2].set(value)
        )
        np.testing.assert_array_equal(found[jnp.array([0, 2])], expected[jnp.array([0, 2])])
        assert np.isnan(found[1]).all()
        same(same_slope, slope)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_logits_of_what_is_no_target_have_no_part_in_the_loss(value: float, reduction: str) -> None:
    given = BATCH | {"loss_mask": jnp.asarray(~REACHED)}
    logits = jnp.asarray(RNG.standard_normal((2, 8, 10)), jnp.float32)
    # The logits at l are of the token at l + 1: those that predict what is reached, and the
    # last of a segment.
    masked = np.roll(REACHED, -1, axis=1) | (np.roll(SEGMENTS, -1, axis=1) != SEGMENTS)
    total = jax.value_and_grad(lambda logits: token_loss(logits, given, reduction).total)
    same(total(jnp.where(masked[..., None], value, logits)), total(logits))


@pytest.mark.parametrize("value", BROKEN)
def test_rows_without_a_pair_have_no_part_in_the_contrastive_loss(value: float) -> None:
    images, texts = (jnp.asarray(RNG.standard_normal((4, 5)), jnp.float32) for _ in range(2))
    real = jnp.array([True, True, False, True])

    def loss(images: jax.Array, texts: jax.Array) -> jax.Array:
        return contrastive_loss(images, texts, jnp.float32(3), 0.1, real=real)[0]

    slope = jax.value_and_grad(loss, (0, 1))
    same(slope(images.at[2].set(value), texts.at[2, 1].set(value)), slope(images, texts))


def test_a_dropped_branch_has_no_part_in_a_block() -> None:
    block = filled(lambda rngs: nfnet.Block(8, 8, 1, False, ONE_STAGE, rngs=rngs))
    block.reduce.bias[...] = jnp.full_like(block.reduce.bias[...], np.nan)
    x = jnp.asarray(RNG.standard_normal((2, 2, 2, 8)), jnp.float32)
    found = block(x, 1.0, jnp.array([False, True]))
    np.testing.assert_array_equal(found[0], x[0])
    assert np.isnan(found[1]).all()


def test_padding_has_no_part_in_a_texts_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the encoder makes of padding may be anything."""
    text = TextEncoderConfig(vocab_size=5, layers=1, width=4, heads=1, max_length=3)
    vision = VisionConfig(variant="one_stage", image_size=8)
    dual = filled_dual_encoder(ContrastiveConfig(vision=vision, text=text, joint_width=4))
    hidden = jnp.asarray(RNG.standard_normal((2, 3, 4)), jnp.float32)
    mask = jnp.asarray([[True, True, False], [True, False, False]])
    found = []
    for value in (0.0, *BROKEN):
        states = jnp.where(mask[..., None], hidden, value)
        monkeypatch.setattr(TextEncoder, "__call__", lambda self, tokens, mask, s=states: s)
        found.append(dual.encode_texts(jnp.zeros((2, 3), jnp.int32), mask))
    assert np.isfinite(found[0]).all()
    for vectors in found[1:]:
        np.testing.assert_array_equal(vectors, found[0])
