"""Visual conditioning: the frozen language model at gates 0, who sees what, packing, decoding."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    MeshConfig,
    ResamplerConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.models import nfnet
from flamingo_jax.models.conditioning import media_mask
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning.mesh import batch_shardings, make_mesh
from flamingo_jax.processing.normalise import normalise
from flamingo_jax.pytrees import to_flat
from tests.models.filling import ONE_STAGE, filled
from tests.rounding import assert_close

LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=40,
    layers=5,
    width=32,
    attention=AttentionConfig(heads=2, head_width=16),
    feed_forward=FeedForwardConfig(width=64),
)
LAYER = 2 * 32 + 32 + 2 * 16 + 24 + 32 + 2 * 32 + 32 + 64
"""Terms of one layer: a norm, projections, scores, at most 12 keys and their values, the map
out, a norm and two products.
"""
TERMS = (5 + 3) * LAYER + 2 * 32 + 32
"""Of the five layers, the three gated blocks and the head."""
CONFIG = FlamingoConfig(
    vision=VisionConfig(variant="tiny", image_size=48),
    language_model=LANGUAGE_MODEL,
    conditioning=ConditioningConfig(
        xattn_every=2,
        heads=2,
        head_width=16,
        feed_forward=64,
    ),
    resampler=ResamplerConfig(
        layers=1, width=24, heads=2, head_width=12, latents=3, frames=2, feed_forward=48
    ),
)
LENGTH, ROWS, PLACES = 12, 2, 3
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 41, (ROWS, LENGTH)), jnp.int32)
POSITIONS = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
SEGMENTS = jnp.ones((ROWS, LENGTH), jnp.int32)
MEDIA_INDEX = jnp.asarray([[-1] * 2 + [0] * 4 + [1] * 3 + [2] * 3, [-1] * 5 + [0] * 7], jnp.int32)
VISUALS = jnp.asarray([[0, 1, 2], [3, -1, -1]], jnp.int32)
VISUAL_TOKENS = jax.random.normal(jax.random.key(1), (ROWS * PLACES, 3, 32))


def conditioned(**changes: Any) -> FlamingoConfig:
    conditioning = dataclasses.replace(CONFIG.conditioning, **changes)
    return dataclasses.replace(CONFIG, conditioning=conditioning)


def make(**changes: Any) -> Flamingo:
    model = Flamingo(conditioned(**changes), rngs=nnx.Rngs(0))
    model.gated_xattn.layers.attention_gate[...] = jnp.full(
        model.gated_xattn.layers.attention_gate.shape, 0.8
    )
    model.gated_xattn.layers.dense_gate[...] = jnp.full(
        model.gated_xattn.layers.dense_gate.shape, 0.5
    )
    return model


@pytest.fixture(scope="module")
def model() -> Flamingo:
    return make()


def forward(
    model: Flamingo, visual_tokens: jax.Array | None = VISUAL_TOKENS, **changes: jax.Array
) -> jax.Array:
    arrays = {
        "tokens": TOKENS,
        "positions": POSITIONS,
        "segments": SEGMENTS,
        "media_index": MEDIA_INDEX,
        "visuals": VISUALS,
    } | changes
    graph, state = nnx.split(model)
    return jax.jit(lambda s, v, a: nnx.merge(graph, s)(visual_tokens=v, **a))(
        state, visual_tokens, arrays
    )


@pytest.mark.parametrize("every", [1, 2])
def test_with_gates_at_zero_the_logits_are_the_language_models_to_the_last_bit(
    every: int,
) -> None:
    model = Flamingo(conditioned(xattn_every=every), rngs=nnx.Rngs(0))
    tokens = jnp.minimum(TOKENS, 39)
    graph, state = nnx.split(model.language_model)
    alone = jax.jit(lambda s, t: nnx.merge(graph, s)(t, POSITIONS, SEGMENTS))(state, tokens)
    np.testing.assert_array_equal(forward(model, tokens=tokens)[..., :40], alone)


def test_text_before_the_first_visual_sees_none(model: Flamingo) -> None:
    other = forward(model, visual_tokens=-VISUAL_TOKENS)
    same = forward(model)
    np.testing.assert_array_equal(other[0, :2], same[0, :2])
    assert float(jnp.abs(other[0, 2:] - same[0, 2:]).max()) > 1e-3


def test_text_with_no_visual_reads_as_if_images_were_taken_away(model: Flamingo) -> None:
    nothing = jnp.full_like(MEDIA_INDEX, -1)
    # Nothing is added to what the language model says.
    assert_close(forward(model, media_index=nothing), forward(model, visual_tokens=None), TERMS)


def test_a_visual_reaches_only_the_text_that_looks_at_it_and_what_reads_that_text(
    model: Flamingo,
) -> None:
    changed = forward(model, visual_tokens=VISUAL_TOKENS.at[1].multiply(-1.0))
    same = forward(model)
    np.testing.assert_array_equal(changed[0, :6], same[0, :6])
    assert float(jnp.abs(changed[0, 6] - same[0, 6]).max()) > 1e-4
    np.testing.assert_array_equal(changed[1], same[1])


def test_an_empty_place_is_never_seen(model: Flamingo) -> None:
    index = MEDIA_INDEX.at[1].set(1)
    np.testing.assert_array_equal(
        forward(model, media_index=index)[1],
        forward(model, media_index=index, visual_tokens=-VISUAL_TOKENS)[1],
    )


def test_segments_that_share_a_visual_both_see_it() -> None:
    index, segments = jnp.asarray([[-1, 0, 0, -1, 0, 0]]), jnp.asarray([[1, 1, 1, 2, 2, 2]])
    for attend in ("last", "all_previous"):
        mask = media_mask(index, segments, jnp.asarray([[0]]), 1, attend)
        np.testing.assert_array_equal(mask[0, 0, :, 0], [False, True, True, False, True, True])


def test_all_previous_sees_earlier_visuals_of_its_own_segment_only() -> None:
    media_index = jnp.asarray([[0, 0, 1, 2, 3, 3]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    mask = media_mask(media_index, segments, jnp.asarray([[5, 6, 7, 8]]), 1, "all_previous")[0, 0]
    expected = [
        [1, 0, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_packing_changes_no_logit(model: Flamingo) -> None:
    rows = forward(model)
    packed = forward(
        model,
        tokens=TOKENS.reshape(1, -1),
        positions=POSITIONS.reshape(1, -1),
        segments=jnp.repeat(jnp.arange(1, ROWS + 1), LENGTH)[None],
        media_index=jnp.where(
            MEDIA_INDEX >= 0, MEDIA_INDEX + PLACES * jnp.arange(ROWS)[:, None], -1
        ).reshape(1, -1),
        visuals=VISUALS.reshape(1, -1),
    )
    assert_close(packed.reshape(rows.shape), rows, TERMS)


@pytest.mark.parametrize("attend", ["last", "all_previous"])
def test_decoding_token_by_token_equals_the_whole_row(attend: str) -> None:
    model = make(attend_to_media=attend)
    whole = forward(model)
    media, cache = model.prepare_media(VISUAL_TOKENS), model.init_cache(ROWS, 16)
    graph, state = nnx.split(model)
    step = jax.jit(lambda s, t, p, m, c: nnx.merge(graph, s).decode(t, p, m, media, VISUALS, c))
    parts = []
    for start, stop in [(0, 9), *((i, i + 1) for i in range(9, LENGTH))]:
        logits, cache = step(
            state,
            TOKENS[:, start:stop],
            POSITIONS[:, start:stop],
            MEDIA_INDEX[:, start:stop],
            cache,
        )
        parts.append(logits)
    assert_close(jnp.concatenate(parts, 1), whole, TERMS)


@pytest.mark.parametrize("counts", [(16, 8), (16, 12), (12,), (8,)])
@pytest.mark.parametrize("frames_at_once", [0, 2])
def test_images_that_divide_are_encoded_where_they_lie(
    counts: tuple[int, ...], frames_at_once: int
) -> None:
    """Only features move then; where they do not divide over all devices, the encoder's work is
    shared out anew.
    """
    vision = VisionConfig(
        image_size=8, vit=ViTConfig(patch_size=4, layers=1, width=8, heads=2, feed_forward=16)
    )
    config = dataclasses.replace(
        CONFIG, vision=vision, language_model=dataclasses.replace(LANGUAGE_MODEL, layers=1)
    )
    graph, state = nnx.split(
        filled(lambda rngs: Flamingo(config, rngs=rngs, frames_at_once=frames_at_once))
    )
    parts = [
        RNG.integers(0, 256, (count, 1 + place, 8, 8, 3), np.uint8)
        for place, count in enumerate(counts)
    ]

    def encode(state: nnx.State, parts: list[Any]) -> list[jax.Array]:
        return nnx.merge(graph, state).encode_images(parts)

    expected = jax.jit(encode)(state, parts)
    divide = all(count % 8 == 0 for count in counts)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        lie = batch_shardings(["images" if divide else "tokens", "visuals"], mesh)[
            "images" if divide else "tokens"
        ]
        compiled = jax.jit(encode, in_shardings=(None, lie)).lower(state, parts).compile()
        found = compiled(state, jax.device_put(parts, lie))
    for a, b in zip(found, expected, strict=True):
        assert a.sharding.shard_shape(a.shape)[0] == a.shape[0] // 4
        assert_close(a, b, TERMS)
    moved = re.findall(
        r"= \(?u8\[.* (?:all-gather|all-to-all|collective-permute|all-reduce)",
        compiled.as_text(),
    )
    assert not (divide and moved)


def test_the_size_of_the_program_does_not_grow_with_depth() -> None:
    def lines(layers: int) -> int:
        config = dataclasses.replace(
            CONFIG, language_model=dataclasses.replace(LANGUAGE_MODEL, layers=layers)
        )
        model = nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        return len(
            jax.jit(
                lambda s: nnx.merge(graph, s)(
                    TOKENS, POSITIONS, SEGMENTS, MEDIA_INDEX, VISUAL_TOKENS, VISUALS
                )
            )
            .lower(state)
            .as_text()
            .splitlines()
        )

    # More groups than are unrolled on CPUs.
    assert lines(58) == lines(38)


def test_gates_start_at_0_unless_told_otherwise() -> None:
    def make(**options: Any) -> Any:
        return Flamingo(conditioned(**options), rngs=nnx.Rngs(0)).gated_xattn.layers

    paper, opened = make(), make(gate_init=1.0, out_scale=0.3)
    for gate in ("attention_gate", "dense_gate"):
        assert not getattr(paper, gate)[...].any() and (getattr(opened, gate)[...] == 1).all()
    assert_close(opened.out[...], 0.3 * paper.out[...], terms=4)
    assert_close(opened.feed_forward.down[...], 0.3 * paper.feed_forward.down[...], terms=4)
    np.testing.assert_array_equal(opened.query[...], paper.query[...])


@pytest.mark.parametrize(
    "vit", [None, ViTConfig(patch_size=4, layers=1, width=8, heads=2, feed_forward=16)]
)
def test_an_encoder_that_trains_has_its_own_gradient_in_rounds_that_are_not_kept(
    vit: ViTConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the encoder called on all frames at once, with no rounds and nothing computed
    again.
    """
    monkeypatch.setitem(nfnet.VARIANTS, "one_stage", ONE_STAGE)
    vision = VisionConfig(variant="one_stage", image_size=16, vit=vit)
    small = dataclasses.replace(LANGUAGE_MODEL, layers=1)
    config = dataclasses.replace(CONFIG, vision=vision, language_model=small)
    images = jnp.asarray(RNG.integers(0, 256, (32, 2, 16, 16, 3)), jnp.uint8)

    model = filled(lambda rngs: Flamingo(config, rngs=rngs, frames_at_once=4, encoder_trains=True))
    graph, encoder, rest = nnx.split(model, nnx.PathContains("vision_encoder"), ...)
    in_rounds = (
        jax.jit(
            jax.grad(
                lambda encoder, rest: jnp.square(
                    nnx.merge(graph, encoder, rest).encode_images([images])[0]
                ).sum()
            )
        )
        .lower(encoder, rest)
        .compile()
    )
    alone_graph, alone_state = nnx.split(model.vision_encoder)
    frames = normalise(images.reshape(-1, 16, 16, 3), vision.mean, vision.std, jnp.float32)
    alone = (
        jax.jit(jax.grad(lambda state: jnp.square(nnx.merge(alone_graph, state)(frames)).sum()))
        .lower(alone_state)
        .compile()
    )
    assert (
        in_rounds.memory_analysis().temp_size_in_bytes
        < alone.memory_analysis().temp_size_in_bytes / 3
    )

    found, expected = to_flat(in_rounds(encoder, rest)), to_flat(alone(alone_state))
    assert found.keys() == {f"vision_encoder/{name}" for name in expected}
    largest = max(float(jnp.abs(value).max()) for value in expected.values())
    for name, value in expected.items():
        # Sums over 64 frames of up to 16 places, forth and back through the encoder.
        assert_close(
            found[f"vision_encoder/{name}"],
            value,
            terms=64 * 16 + 2 * 200,
            size=largest,
            err_msg=name,
        )
