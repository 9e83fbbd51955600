"""Every kind of conditioning: against its layers run one by one, without effect at the start,
decoded as it is trained.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import (
    AttentionConfig,
    ConditioningConfig,
    FeedForwardConfig,
    FlamingoConfig,
    LanguageModelConfig,
    ResamplerConfig,
    VisionConfig,
    ViTConfig,
)
from flamingo_jax.models.attention import causal_mask
from flamingo_jax.models.cache import Beams
from flamingo_jax.models.conditioning import CrossAttentionBlock, Media, media_mask
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.packing import MediaView, PackedText, Packing
from flamingo_jax.pytrees import from_flat, to_flat
from tests.rounding import assert_close

LANGUAGE_MODEL = LanguageModelConfig(
    vocab_size=20,
    layers=3,
    width=16,
    attention=AttentionConfig(heads=2, head_width=8),
    feed_forward=FeedForwardConfig(width=32),
)
SMALL = ConditioningConfig(heads=2, head_width=8, feed_forward=32, grafted_layers=2)
KINDS: dict[str, dict[str, Any]] = {
    "gated_xattn_dense": {},
    "gated_xattn_dense, from the second layer on": {"xattn_first": 1, "xattn_every": 2},
    "gated_xattn_dense, a single one": {"xattn_first": 1, "xattn_every": 3},
    "gated_xattn_dense, no gates": {"gating": "none"},
    "gated_xattn_dense, text beside": {"text_window": 2, "xattn_every": 2},
    "vanilla_xattn": {"kind": "vanilla_xattn", "xattn_every": 2},
    "vanilla_xattn, text beside": {"kind": "vanilla_xattn", "text_window": 3},
    "vanilla_xattn, no gates": {"kind": "vanilla_xattn", "gating": "none"},
    "grafting": {"kind": "grafting"},
    "grafting, no gates": {"kind": "grafting", "gating": "none", "text_window": 2},
}
DIFFERENT = [
    "gated_xattn_dense, from the second layer on",
    "gated_xattn_dense, text beside",
    "vanilla_xattn, text beside",
    "grafting",
    "grafting, no gates",
]
"""Those that decode by code of their own; the paper's kind is in test_flamingo.py."""
TERMS = (3 + 3) * (2 * 16 + 16 + 2 * 8 + 12 + 16 + 2 * 16 + 16 + 32) + 16 + 16
"""Of the layers and blocks, at most three each, and the head: norms, projections, scores, keys
and values, maps out and feed-forwards.
"""
RNG = np.random.default_rng(0)
ROWS, LENGTH, PLACES = 2, 6, 2
TOKENS = jnp.asarray(RNG.integers(0, 20, (ROWS, LENGTH)), jnp.int32)
POSITIONS = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
SEGMENTS = jnp.ones((ROWS, LENGTH), jnp.int32)
MEDIA_INDEX = jnp.asarray([[-1, -1, 0, 0, 1, 1], [-1, 0, 0, 0, 0, 0]], jnp.int32)
VISUALS = jnp.asarray([[0, 1], [2, -1]], jnp.int32)
VISUAL_TOKENS = jax.random.normal(jax.random.key(1), (ROWS * PLACES, 3, 16))


VIT = ViTConfig(patch_size=8, layers=1, width=8, heads=1, feed_forward=8)


@functools.cache
def make(name: str, gates: float | None = 0.7) -> Flamingo:
    config = FlamingoConfig(
        vision=VisionConfig(image_size=8, vit=VIT),
        language_model=LANGUAGE_MODEL,
        conditioning=dataclasses.replace(SMALL, **KINDS[name]),
        resampler=ResamplerConfig(
            layers=1, width=8, heads=1, head_width=8, latents=3, frames=2, feed_forward=8
        ),
    )
    model = Flamingo(config, rngs=nnx.Rngs(0))
    if gates is None:
        return model
    graph, state = nnx.split(model)
    flat = to_flat(state)
    opened = {name: jnp.full_like(a, gates) for name, a in flat.items() if name.endswith("gate")}
    return nnx.merge(graph, nnx.State(from_flat(flat | opened)))


@functools.cache
def whole_rows(name: str, gates: float | None = 0.7) -> jax.Array:
    model = make(name, gates)
    graph, state = nnx.split(model)
    return jax.jit(
        lambda state: nnx.merge(graph, state)(
            TOKENS, POSITIONS, SEGMENTS, MEDIA_INDEX, VISUAL_TOKENS, VISUALS
        )
    )(state)


def seen(media_index: jax.Array, window: int = 0) -> MediaView:
    """What tokens of the rows see: their visual, and the window's text where there is one."""
    mask = media_mask(media_index, SEGMENTS, VISUALS, 3, "last")
    text = (causal_mask(SEGMENTS, window) & mask.any(-1, keepdims=True),) if window else ()
    return MediaView((mask,), VISUALS, text)


def taken(stack: Any, place: int) -> Any:
    graph, state = nnx.split(stack)
    return nnx.merge(graph, jax.tree.map(lambda a: a[place], state))


def one_by_one(model: Flamingo, read: list[Any] | None = None) -> jax.Array:
    """The logits by the modules' own parts, each layer and block called in its turn.

    read: gets each block and the text that it reads.
    """
    c = model.config.conditioning
    view = seen(MEDIA_INDEX, c.text_window)
    blocks = [taken(model.gated_xattn.layers, place) for place in range(blocks_of(model))]
    places = list(range(c.xattn_first, LANGUAGE_MODEL.layers, c.xattn_every))

    def see(block: CrossAttentionBlock, x: jax.Array) -> jax.Array:
        if read is not None:
            read.append((block, x))
        return block.attend(x, block.project_visuals(VISUAL_TOKENS), view, block.project_text(x))

    def halves(layer: Any, x: jax.Array, block: Any = None) -> jax.Array:
        h, _ = layer.attention(layer.attention_norm(x), POSITIONS, Packing((SEGMENTS,)), None)
        x = x + h if block is None else see(block, x + h)
        return x + layer.feed_forward(layer.feed_forward_norm(x))

    x = model.language_model.embed(TOKENS)
    for place in range(LANGUAGE_MODEL.layers):
        layer = taken(model.language_model.layers, place)
        block = blocks[places.index(place)] if place in places and c.kind != "grafting" else None
        if block is not None and c.kind == "gated_xattn_dense":
            x, block = see(block, x), None
        x = halves(layer, x, block)
    if c.kind == "grafting":
        for place, block in enumerate(blocks):
            layer = taken(model.grafted.layers, place)
            x = see(block, x)
            gate = 1.0 if layer.gate is None else jnp.tanh(layer.gate[...])
            x = x + gate * (halves(layer, x) - x)
    return model.language_model.logits(x)


def blocks_of(model: Flamingo) -> int:
    return model.gated_xattn.layers.query.shape[0]


@pytest.mark.parametrize("name", KINDS)
def test_layers_and_blocks_come_in_their_order(name: str) -> None:
    graph, state = nnx.split(make(name))
    expected = jax.jit(lambda state: one_by_one(nnx.merge(graph, state)))(state)
    assert_close(whole_rows(name)[..., :20], expected, TERMS, size=np.abs(expected).max())


def layer_norm(x: Any, norm: Any) -> np.ndarray:
    """A LayerNorm in float64."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def block_weights(block: Any, y: Any, b: int, place: int, window: int) -> np.ndarray:
    """The weights of one token over its row's visual tokens, [N, R]: in float64, by its formula,
    key by key.
    """
    phi, tokens = int(MEDIA_INDEX[b, place]), VISUAL_TOKENS.shape[1]
    found = np.zeros((PLACES, tokens))
    if phi < 0:
        return found
    query = np.einsum("d,dhe->he", layer_norm(y[b, place], block.attention_norm), block.query[...])
    seen = layer_norm(VISUAL_TOKENS[VISUALS[b, phi]], block.media_norm)
    first = max(0, place - window + 1)
    text = layer_norm(y[b, first : place + 1], block.attention_norm) if window else seen[:0]
    keys = np.einsum("sd,dhe->she", np.concatenate([seen, text]), block.key[...])
    for head in range(keys.shape[1]):
        scores = np.exp(keys[:, head] @ query[head] / np.sqrt(keys.shape[-1]))
        found[phi] += (scores / scores.sum())[:tokens] / keys.shape[1]
    return found


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_blocks_weights_are_those_of_its_formula(name: str) -> None:
    model, window = make(name), KINDS[name].get("text_window", 0)
    places = jnp.asarray([[0, 2, 3, 5], [5, 1, 4, 0]])
    text = PackedText(TOKENS, POSITIONS, SEGMENTS, MEDIA_INDEX, VISUALS)
    graph, state = nnx.split(model)
    logits, found = jax.jit(
        lambda state: nnx.merge(graph, state).cross_attention(text, VISUAL_TOKENS, places)
    )(state)
    wanted = jnp.take_along_axis(whole_rows(name), places[..., None], 1)
    assert_close(logits, wanted, TERMS, size=np.abs(wanted).max())
    read: list[Any] = []
    one_by_one(model, read)
    expected = [
        [[block_weights(block, y, b, int(t), window) for t in places[b]] for b in range(ROWS)]
        for block, y in read
    ]
    # A score is a sum of terms, and its exponential as far off, in parts of the weight.
    np.testing.assert_allclose(found, np.asarray(expected), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in DIFFERENT if "no gates" not in name])
def test_with_gates_at_zero_the_logits_are_the_language_models_to_the_last_bit(
    name: str,
) -> None:
    model = make(name, gates=None)
    graph, state = nnx.split(model.language_model)
    alone = jax.jit(lambda s: nnx.merge(graph, s)(TOKENS, POSITIONS, SEGMENTS))(state)
    np.testing.assert_array_equal(whole_rows(name, gates=None)[..., :20], alone)


@pytest.mark.parametrize("name", DIFFERENT)
def test_decoding_in_pieces_and_in_beams_equals_the_whole_row(name: str) -> None:
    """The last two tokens in beams of two, of which the second and then the first has the
    row's own token, and the others another one.
    """
    model = make(name)
    media, cache = model.prepare_media(VISUAL_TOKENS), model.init_cache(ROWS, 8)
    graph, state = nnx.split(model)
    step = jax.jit(lambda s, t, p, m, *c: nnx.merge(graph, s).decode(t, p, m, media, VISUALS, *c))
    found = []
    for piece in (slice(0, 3), slice(3, 4)):
        given = (TOKENS[:, piece], POSITIONS[:, piece], MEDIA_INDEX[:, piece])
        logits, cache = step(state, *given, cache)
        found.append(logits)
    held = jnp.tile(jnp.array([0, 1, 2, 3, 4, 4, 5, 5]), (ROWS, 1))
    paths = [[[4], [5]], [[5, 6], [5, 7]]]
    for place, own, of_step in ((4, 1, paths[0]), (5, 0, paths[1])):
        tokens = (TOKENS[:, place, None] + jnp.arange(2) - own) % 20
        seen = np.tile(np.arange(8) < 4, (ROWS, 2, 1))
        for beam, path in enumerate(of_step):
            seen[:, beam, path] = True
        slots = jnp.tile(jnp.array([path[-1] for path in of_step]), (ROWS, 1))
        beams = Beams(slots, held, jnp.asarray(seen))
        given = (tokens, *(jnp.repeat(a[:, place, None], 2, 1) for a in (POSITIONS, MEDIA_INDEX)))
        logits, cache = step(state, *given, cache, beams)
        found.append(logits[:, own, None])
    expected = whole_rows(name)
    assert_close(jnp.concatenate(found, 1), expected, TERMS, size=np.abs(expected).max())


@pytest.mark.parametrize("kind", ["gated_xattn_dense", "vanilla_xattn"])
@pytest.mark.parametrize(("gating", "window"), [("tanh", 0), ("none", 0), ("none", 3)])
def test_a_token_without_a_visual_gets_exactly_zero(kind: Any, gating: Any, window: int) -> None:
    config = dataclasses.replace(SMALL, kind=kind, gating=gating, gate_init=0.9, text_window=window)
    block = CrossAttentionBlock(config, 16, rngs=nnx.Rngs(0))
    y = jax.random.normal(jax.random.key(2), (ROWS, LENGTH, 16))
    media, text = block.project_visuals(VISUAL_TOKENS), block.project_text(y)
    nothing, some = seen(jnp.full_like(MEDIA_INDEX, -1), window), seen(MEDIA_INDEX, window)
    np.testing.assert_array_equal(
        block.attend(y, media, nothing, text), block.attend(y, None, None)
    )
    huge = Media(media.key * 1e6, media.value * 1e6)
    without = np.asarray(MEDIA_INDEX) < 0
    np.testing.assert_array_equal(
        np.asarray(block.attend(y, huge, some, text))[without],
        np.asarray(block.attend(y, media, some, text))[without],
    )


def test_text_beside_the_visual_shares_its_softmax() -> None:
    """Against a token's keys picked one by one: three of its visual and two of text."""
    config = dataclasses.replace(
        SMALL, kind="vanilla_xattn", gating="none", text_window=2, heads=1, head_width=8
    )
    block = CrossAttentionBlock(config, 16, rngs=nnx.Rngs(0))
    y = jax.random.normal(jax.random.key(2), (ROWS, LENGTH, 16))
    view, media = seen(MEDIA_INDEX, 2), block.project_visuals(VISUAL_TOKENS)
    found = np.asarray(block.attend(y, media, view, block.project_text(y)) - y)
    text = np.asarray(block.attention_norm(y))
    visual = np.asarray(block.media_norm(VISUAL_TOKENS))
    query, key, value = (np.asarray(w[...])[:, 0] for w in (block.query, block.key, block.value))
    for row, token in np.ndindex(ROWS, LENGTH):
        place = int(MEDIA_INDEX[row, token])
        if place < 0:
            assert not found[row, token].any()
            continue
        looked_at = np.concatenate(
            [visual[int(VISUALS[row, place])], text[row, max(token - 1, 0) : token + 1]]
        )
        scores = (text[row, token] @ query) @ (looked_at @ key).T * 8**-0.5
        weights = np.exp(scores - scores.max())
        h = (weights / weights.sum()) @ (looked_at @ value)
        expected = h @ np.asarray(block.out[...])[0]
        # Norms of 16, keys and values of 16, 5 weights, the map out of 8, and the sum with y.
        assert_close(found[row, token], expected, 16 + 2 * 16 + 5 + 8 + 8, size=4.0)


def test_blocks_have_what_their_kind_needs() -> None:
    """By the sizes of one block, of D = 16 and 2 heads of 8: 4 D^2 and 2 x 32 D, and gates."""

    def parameters(name: str) -> dict[str, tuple[int, ...]]:
        return {key: value.shape for key, value in to_flat(nnx.state(make(name))).items()}

    vanilla, bare, full = (
        parameters(name) for name in ("vanilla_xattn", "vanilla_xattn, no gates", "grafting")
    )
    gates = {name for name in full if name.endswith("gate")}
    assert gates == {
        "gated_xattn/layers/attention_gate",
        "gated_xattn/layers/dense_gate",
        "grafted/layers/gate",
    }
    assert not any("feed_forward" in name and "gated_xattn" in name for name in vanilla)
    assert vanilla.keys() - bare.keys() == {"gated_xattn/layers/attention_gate"}
    assert vanilla["gated_xattn/layers/query"][0] == 2 and bare["gated_xattn/layers/query"][0] == 3
    layer = {name.removeprefix("language_model/"): shape for name, shape in full.items()}
    for name, shape in full.items():
        if name.startswith("grafted/layers/") and name not in gates:
            assert shape == (2, *layer[name.removeprefix("grafted/")][1:])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"xattn_first": 3}, "xattn_first is 3, but the language model has layers 0 to 2"),
        (
            {"gating": "none", "gate_init": 1.0},
            "gate_init is 1.0, but gating 'none' has no gates",
        ),
    ],
)
def test_a_config_that_has_no_place_for_blocks(changes: dict[str, Any], sentence: str) -> None:
    config = FlamingoConfig(
        language_model=LANGUAGE_MODEL, conditioning=dataclasses.replace(SMALL, **changes)
    )
    with pytest.raises(UserError, match=sentence):
        nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0)))


def test_between_the_halves_needs_halves_in_sequence() -> None:
    parallel = dataclasses.replace(LANGUAGE_MODEL, residual="parallel")
    config = FlamingoConfig(
        language_model=parallel, conditioning=dataclasses.replace(SMALL, kind="vanilla_xattn")
    )
    with pytest.raises(UserError, match="run side by side"):
        nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0)))
