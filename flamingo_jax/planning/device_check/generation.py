"""Times generation with random weights on this device: visuals, prefill, and tokens a second, by
batch and with beam search.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flamingo_jax.experiment import Experiment, FlamingoConfig
from flamingo_jax.inference import programs
from flamingo_jax.inference.generation import DecodingConfig, TokenConstraints, generate
from flamingo_jax.inference.prefill import PromptArrays
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning import rules
from flamingo_jax.planning.device_check.sections import Budget, CheckFailed, Results
from flamingo_jax.planning.device_check.sizes import DeviceCheckSize
from flamingo_jax.planning.device_check.step import peak_bytes
from flamingo_jax.planning.timing import median_seconds
from flamingo_jax.pytrees import from_flat, to_flat

RUNS = 3


@functools.partial(jax.jit, static_argnames=("graph", "decoding"))
def _generate(
    graph: Any,
    state: nnx.State,
    prompts: PromptArrays,
    media: Any,
    keys: jax.Array,
    decoding: DecodingConfig,
) -> Any:
    # No stop token: every row is as long as it may be.
    return generate(
        nnx.merge(graph, state), prompts, media, keys, decoding, TokenConstraints(stop=())
    )


def check_generation(size: DeviceCheckSize, results: Results, budget: Budget) -> None:
    """Measures encoding, prefill and decoding of prompts with visuals on the default device.

    Raises: CheckFailed where a generated score is not finite.
    """
    assert size.train.flamingo is not None
    config = size.train.flamingo
    graph, state = random_model(size.train)
    results.put("device", jax.devices()[0].device_kind)
    results.put(
        "prompt",
        {"tokens": size.prompt_tokens, "visuals": size.visuals, "new_tokens": size.new_tokens},
    )
    for batch in size.batches:
        for beams in (1, size.beams):
            if budget.left < 0:
                return
            name = f"batch {batch}" + (f", {beams} beams" if beams > 1 else "")
            results.put(name, _measure(graph, state, config, size, batch, beams))
    results.put("peak_bytes", peak_bytes())


def random_model(experiment: Experiment) -> tuple[Any, nnx.State]:
    """Makes a Flamingo with random weights in the dtypes of an export: trained ones float32,
    frozen ones in the compute dtype -> (graph, state).
    """
    config, dtype = experiment.flamingo, jnp.dtype(experiment.training.compute_dtype)
    assert config is not None

    def build(key: jax.Array) -> Flamingo:
        return Flamingo(config, rngs=nnx.Rngs(params=key), dtype=dtype)

    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    trained = rules.trainable_names("flamingo", to_flat(shapes))

    def weights(key: jax.Array) -> dict[str, jax.Array]:
        flat = to_flat(nnx.state(build(key)))
        return {name: a if name in trained else a.astype(dtype) for name, a in flat.items()}

    return graph, nnx.State(from_flat(jax.jit(weights)(jax.random.key(0))))


def _measure(
    graph: Any,
    state: nnx.State,
    config: FlamingoConfig,
    size: DeviceCheckSize,
    batch: int,
    beams: int,
) -> dict[str, Any]:
    """Times one batch of prompts."""
    rng, length = np.random.default_rng(batch), size.prompt_tokens
    side, visuals = config.vision.image_size, batch * size.visuals
    images = jnp.asarray(rng.integers(0, 256, (visuals, 1, side, side, 3), dtype=np.uint8))
    encode = functools.partial(
        programs.encode_visuals, graph, state, images, jnp.ones((visuals, 1), bool)
    )
    prepare = functools.partial(programs.prepare_media, graph, state, encode())
    media = prepare()
    tokens = rng.integers(0, config.language_model.vocab_size, (batch, length), dtype=np.int32)
    # Visuals are spread evenly over the prompt.
    index = np.arange(length, dtype=np.int32) * size.visuals // length
    prompts = PromptArrays(
        jnp.asarray(tokens),
        jnp.asarray(np.tile(index, (batch, 1))),
        jnp.full(batch, length, jnp.int32),
        jnp.arange(visuals, dtype=jnp.int32).reshape(batch, -1),
    )
    keys = jax.random.split(jax.random.key(0), batch)
    decoding = DecodingConfig(max_tokens=size.new_tokens, beam_size=beams)

    def whole() -> Any:
        return _generate(graph, state, prompts, media, keys, decoding)

    made = whole()
    if not np.isfinite(np.asarray(made.score)).all():
        raise CheckFailed(f"the score of a generated text is {np.asarray(made.score)[0]}")
    read: Callable[[], Any] = functools.partial(
        programs.prefill_prompts, graph, state, prompts, media, length + size.new_tokens
    )
    seconds = {
        "encode": median_seconds(encode, RUNS),
        "prepare": median_seconds(prepare, RUNS),
        "prefill": median_seconds(read, RUNS),
        "generate": median_seconds(whole, RUNS),
    }
    decoding_seconds = max(seconds["generate"] - seconds["prefill"], 1e-9)
    return {
        "seconds": seconds,
        "milliseconds_per_token": 1e3 * decoding_seconds / size.new_tokens,
        "tokens_per_second": batch * size.new_tokens / decoding_seconds,
        "prefill_tokens_per_second": batch * length / seconds["prefill"],
    }
