"""A small model of the synthetic world with random weights."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

import flamingo_jax as fj
from configs.quickstart import flamingo
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import from_flat, to_flat


def world_model(root: pathlib.Path) -> fj.Model:
    """The quickstart's Flamingo with two layers, for the data in ROOT/data: random weights drawn
    in numpy (nothing to compile), gates open, and an <EOC> that is never the likeliest token.
    """
    config = flamingo(str(root)).flamingo
    assert config is not None
    language_model = dataclasses.replace(config.language_model, layers=2)
    config = dataclasses.replace(config, language_model=language_model)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: fj.Flamingo(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("_gate", "scale", "gain")):
            return np.ones(shape, np.float32)
        if name == "extra_embedding":
            return np.zeros(shape, np.float32)
        fan_in = shape[-2] if len(shape) > 1 else 1
        return rng.normal(0, fan_in**-0.5, shape).astype(np.float32)

    parameters = {n: jnp.asarray(draw(n, like.shape)) for n, like in to_flat(shapes).items()}
    model = nnx.merge(graph, nnx.State(from_flat(parameters)))
    tokenizer = Tokenizer.load(root / "data/tokenizer", config.language_model.vocab_size)
    return fj.Model(model, tokenizer)


def make_world_export(root: pathlib.Path) -> None:
    """Writes `world_model` to ROOT/export."""
    world_model(root).save(root / "export")
