"""What a token costs: the weights that it meets, and attention to what came before."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import flamingo_3b, flamingo_80b
from flamingo_jax.configuring import from_config
from flamingo_jax.experiment import Experiment, FlamingoConfig
from flamingo_jax.inference.beam_search import beam_search
from flamingo_jax.inference.decoding import DecodingConfig, TokenConstraints
from flamingo_jax.inference.prefill import PromptArrays
from flamingo_jax.models.cache import SharedCache, map_cache
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.positions import TransformerXL
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks.flops import product_flops
from tests.inference.tiny_models import tiny_config
from tests.models.filling import filled

SLOTS = 1056


def abstract(config: FlamingoConfig) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))


def token_flops(config: FlamingoConfig) -> tuple[int, int]:
    """FLOPs of a decoded token, and how many parameters it meets: not those of visuals and of
    distances.
    """
    graph, state = abstract(config)
    width, latents = config.language_model.width, config.resampler.latents

    def prepare(state: Any) -> Any:
        model = nnx.merge(graph, state)
        visual = jnp.zeros((1, latents, width), jnp.bfloat16)
        return model.prepare_media(visual), model.init_cache(1, SLOTS)

    def decode(state: Any, media: Any, cache: Any) -> Any:
        one = jnp.zeros((1, 1), jnp.int32)
        return nnx.merge(graph, state).decode(one, one + SLOTS - 1, one, media, one, cache)

    jaxpr = jax.make_jaxpr(decode)(state, *jax.eval_shape(prepare, state)).jaxpr
    met = sum(
        math.prod(leaf.shape)
        for name, leaf in to_flat(state).items()
        if re.match("language_model/|gated_xattn/|extra_embedding", name)
        and not re.search("attention/position$|gated_xattn/layers/(key|value)$", name)
    )
    return product_flops(jaxpr), met


@pytest.mark.parametrize("config", [flamingo_3b, flamingo_80b])
def test_a_decoded_token_costs_little_more_than_the_parameters_that_it_meets(
    config: Any,
) -> None:
    flamingo = from_config(Experiment, config.get_config()).flamingo
    assert flamingo is not None
    flops, met = token_flops(flamingo)
    print(
        f"\n{flops / 1e9:.2f} GFLOP a token, {flops / (2 * met):.3f} times its {met / 1e9:.2f}"
        " G parameters"
    )
    assert 1 <= flops / (2 * met) <= 1.15


def test_beams_share_the_prompts_cache_and_distances_are_projected_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt of 5 tokens has 5 slots, and each of 7 new ones a slot for every beam. The loop
    over tokens has no product with the distances' map.
    """
    graph, state = abstract(tiny_config(20))
    asked: list[Any] = []
    decode = Flamingo.decode
    monkeypatch.setattr(TransformerXL, "keys", lambda *_: pytest.fail("computed again"))

    def spy(self: Flamingo, *given: Any, **options: Any) -> Any:
        cache = given[5].text
        asked.append((given[0].shape, cache.key.shape, cache.distances.value.shape))
        return decode(self, *given, **options)

    def run(state: Any, beam_size: int) -> Any:
        model = nnx.merge(graph, state)
        tokens = jnp.ones((2, 5), jnp.int32)
        prompts = PromptArrays(tokens, tokens - 2, jnp.array([5, 3]), None)
        decoding = DecodingConfig(7, beam_size=beam_size)
        return beam_search(model, prompts, None, decoding, TokenConstraints((3,)))

    monkeypatch.setattr(Flamingo, "decode", spy)
    for beam_size in (1, 3):
        jax.eval_shape(functools.partial(run, beam_size=beam_size), state)
        cache = ((2, 2, 2, 5 + 7 * beam_size, 16), (2, 12, 2, 16))
        # Once for the prompt and once for the loop's step, which is traced several times.
        assert asked[0] == ((2, 5), *cache)
        assert set(asked[1:]) == {((2, beam_size), *cache)}
        asked.clear()


def test_a_cache_changed_row_by_row_keeps_what_rows_share() -> None:
    config = tiny_config(20).language_model
    model = filled(lambda rngs: LanguageModel(config, rngs=rngs))
    cache = model.init_cache(2, 6)
    doubled = map_cache(lambda a: jnp.repeat(a, 2, axis=1), cache)
    assert isinstance(doubled.distances, SharedCache) and doubled.distances is cache.distances
    assert doubled.key.shape == (2, 4, 2, 6, 16)
    graph, state = nnx.split(model)
    decode = jax.jit(lambda state, *given: nnx.merge(graph, state).decode(*given)[1])
    after = decode(state, jnp.ones((4, 1), jnp.int32), jnp.zeros((4, 1), jnp.int32), doubled)
    np.testing.assert_array_equal(after.distances.value, cache.distances.value)
    for layer, keys in enumerate(cache.distances.value):
        # Distance n has the code (sin n f, cos n f).
        angles = np.arange(6)[:, None] * 1e4 ** (-np.arange(16) / 16)
        codes = np.concatenate([np.sin(angles), np.cos(angles)], -1)
        weights = np.asarray(model.layers.attention.position[...][layer], np.float64)
        expected = np.einsum("sw,whd->shd", codes, weights)
        np.testing.assert_allclose(keys, expected, atol=1e-5)
