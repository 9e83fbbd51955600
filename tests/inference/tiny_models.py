"""Small stand-ins: a model whose next-token probabilities are a table of all that came before,
and a tiny Flamingo.
"""

import dataclasses
import io
import pathlib
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import sentencepiece
from flax import nnx

from flamingo_jax.checkpointing.export import export_model
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
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.models.cache import LINE, Continuation
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.processing.tokenizer import SentencePieceTokenizer, Tokenizer
from flamingo_jax.pytrees import from_flat, to_flat

WORDS = (
    "a an red blue green circle square star at the top left Output Question Answer what colour"
    " is this dax wug".split()
)  # noqa: SIM905


class TableModel:
    """Logits are a random table looked up by a hash of the whole prefix, so that every history
    has its own distribution.
    """

    config = SimpleNamespace(conditioning=ConditioningConfig())
    buckets = 4096

    def __init__(self, vocabulary: int, seed: int = 0, sharpness: float = 2.0):
        rng = np.random.default_rng(seed)
        self.table = jnp.asarray(
            sharpness * rng.normal(size=(self.buckets, vocabulary)), jnp.float32
        )
        self.weights = jnp.asarray(rng.integers(1, self.buckets, 64), jnp.int32)

    def init_cache(self, batch: int, slots: int, length: int | None = None) -> Any:
        """Tokens, counted from 1: [1, B, 1, S, 1]."""
        return jnp.zeros((1, batch, 1, slots, 1), jnp.int32)

    def decode(
        self,
        tokens: Any,
        positions: Any,
        media_index: Any,
        media: Any,
        visuals: Any,
        cache: Any,
        continuation: Continuation = LINE,
        *,
        rows_own_visuals: bool = False,
    ) -> tuple[Any, Any]:
        new, slots = tokens[..., None, None] + 1, cache.shape[3]
        held, kept = continuation.extend(cache[0], new, positions)
        # Every prefix is a number, mixed so that similar prefixes lie apart.
        weights = self.weights[continuation.places(positions, slots)]
        mixed = (held[:, None, :, 0, 0] * weights[:, None]) ** 2 % 7919
        place = jnp.where(continuation.mask(positions, slots)[:, 0], mixed, 0).sum(-1)
        return self.table[place % self.buckets], kept[None]


def make_tokenizer() -> Tokenizer:
    """A SentencePiece model of a few words, with the image tag as one piece."""
    model = io.BytesIO()
    sentences = [
        " ".join(WORDS),
        *(
            "".join(f" {w}" for w in np.random.default_rng(i).permutation(WORDS))
            for i in range(200)
        ),
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [*sentences, "Question: what colour is this? Answer: red. Output: a red circle"] * 2
        ),
        model_writer=model,
        vocab_size=90,
        model_type="unigram",
        hard_vocab_limit=False,
        user_defined_symbols=["<image>"],
        pad_id=3,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue())


def tiny_config(vocabulary: int) -> FlamingoConfig:
    return FlamingoConfig(
        vision=VisionConfig(
            variant="tiny", image_size=32, mean=(0.2, 0.2, 0.2), std=(0.25, 0.25, 0.25)
        ),
        language_model=LanguageModelConfig(
            vocab_size=vocabulary,
            layers=2,
            width=32,
            attention=AttentionConfig(heads=2, head_width=16),
            feed_forward=FeedForwardConfig(width=64),
        ),
        resampler=ResamplerConfig(
            layers=1, width=32, heads=2, head_width=16, latents=4, frames=4, feed_forward=64
        ),
        conditioning=ConditioningConfig(
            heads=2,
            head_width=16,
            feed_forward=64,
        ),
    )


def make_loaded(**changes: Any) -> LoadedFlamingo:
    """A Flamingo of random weights, drawn in numpy (nothing to compile), with open gates so
    that images matter.
    """
    tokenizer = make_tokenizer()
    config = dataclasses.replace(tiny_config(tokenizer.vocab_size), **changes)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("_gate", "scale", "gain")):
            return np.ones(shape, np.float32)
        return rng.normal(0, 0.25, shape).astype(np.float32)

    parameters = {
        name: jnp.asarray(draw(name, like.shape)) for name, like in to_flat(shapes).items()
    }
    return LoadedFlamingo(nnx.merge(graph, nnx.State(from_flat(parameters))), tokenizer, config)


def make_export(folder: pathlib.Path) -> LoadedFlamingo:
    """A Flamingo of one layer everywhere, quick to compile, exported to `folder`."""
    vit = ViTConfig(patch_size=16, layers=1, width=32, heads=2, feed_forward=64)
    vision = VisionConfig(vit=vit, image_size=32)
    language_model = tiny_config(make_tokenizer().vocab_size).language_model
    loaded = make_loaded(
        vision=vision, language_model=dataclasses.replace(language_model, layers=1)
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    loaded.tokenizer.save(folder.parent)
    export_model(
        folder,
        kind="flamingo",
        config=dataclasses.asdict(loaded.config),
        parameters={k: np.asarray(v) for k, v in to_flat(nnx.split(loaded.model)[1]).items()},
        tokenizer_file=folder.parent / "tokenizer.model",
    )
    return loaded
