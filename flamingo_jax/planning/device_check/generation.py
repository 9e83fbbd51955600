"""Times generation with random weights on this device: prefill, tokens a second, and captions by
beam search, by the number of prompts at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.experiment import Experiment
from flamingo_jax.inference.model import Model
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.partitioning import rules
from flamingo_jax.planning.device_check.sections import Budget, CheckFailed, Results
from flamingo_jax.planning.device_check.sizes import DeviceCheckSize
from flamingo_jax.planning.device_check.step import peak_bytes
from flamingo_jax.planning.generation_timing import (
    BEAMS,
    SHOTS,
    GenerationWork,
    NumberTokenizer,
    PromptMaker,
    time_rates,
)
from flamingo_jax.pytrees import from_flat, to_flat


def check_generation(size: DeviceCheckSize, results: Results, budget: Budget) -> None:
    """Measures generation after 4 shots, on the default device.

    Raises: CheckFailed where the score of a text is not finite.
    """
    model = random_model(size.train)
    results.put("device", jax.devices()[0].device_kind)
    prompts = PromptMaker(model)
    first = model.generate(prompts.prompt(), max_tokens=size.new_tokens, beam_size=1)
    if not jnp.isfinite(first.score):
        raise CheckFailed(f"the score of a generated text is {first.score}")
    results.put("prompt", f"{SHOTS} shots and a query, {size.new_tokens} new tokens")
    work = GenerationWork(max_tokens=size.new_tokens, runs=size.runs)
    for count in size.batches:
        if budget.left < 0:
            break
        rates = time_rates(model, prompts, count, work)
        results.put(
            f"batch {count}",
            {
                "prefill_tokens_per_second": rates.prefill,
                "decoded_tokens_per_second": rates.decode,
                f"caption_seconds_{BEAMS}_beams": rates.caption,
            },
        )
    results.put("peak_bytes", peak_bytes())


def random_model(experiment: Experiment) -> Model:
    """Makes a Flamingo of random weights in the dtypes of an export, drawn on the device: trained
    ones float32, frozen ones in the compute dtype.
    """
    config, dtype = experiment.flamingo, jnp.dtype(experiment.training.compute_dtype)
    assert config is not None

    def build(key: jax.Array) -> Flamingo:
        return Flamingo(config, rngs=nnx.Rngs(params=key), dtype=dtype)

    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    trained = rules.trainable_names("flamingo", to_flat(shapes))

    def weights(key: jax.Array) -> dict[str, Any]:
        flat = to_flat(nnx.state(build(key)))
        return {name: a if name in trained else a.astype(dtype) for name, a in flat.items()}

    state = nnx.State(from_flat(jax.jit(weights)(jax.random.key(0))))
    return Model(nnx.merge(graph, state), NumberTokenizer(config.language_model.vocab_size))
