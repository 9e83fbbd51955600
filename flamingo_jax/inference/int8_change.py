"""Measures what int8 frozen weights save, and how much they change a model's predictions."""

import functools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.interop.load import load_language_model
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks.flamingo import masked_batch
from flamingo_jax.tasks.token_loss import target_mask
from flamingo_jax.weight_parts import is_multiplied

Batch = Mapping[str, Any]


class PartMemory(NamedTuple):
    """The memory of a part's parameters, in bytes over all devices."""

    parameters: int
    bfloat16: int
    int8: int

    @property
    def ratio(self) -> float:
        """Returns int8's share of bfloat16's memory."""
        return self.int8 / self.bfloat16


class PredictionChange(NamedTuple):
    """How the predictions of a model's next tokens change with int8 frozen weights.

    tokens: how many predictions were compared.
    perplexity, int8_perplexity: exp of the mean negative log-likelihood.
    divergence: KL(before || after) in nats, the mean; divergence_99: the 99th percentile of
      tokens. largest_divergence: of a token.
    largest_difference: the largest absolute difference of a logit.
    same_choice: the share of tokens whose most likely next token is the same.
    """

    tokens: int
    perplexity: float
    int8_perplexity: float
    divergence: float
    divergence_99: float
    largest_divergence: float
    largest_difference: float
    same_choice: float

    @property
    def rise(self) -> float:
        """Returns by which share the perplexity rises."""
        return self.int8_perplexity / self.perplexity - 1


class Int8Change(NamedTuple):
    """The memory by part of the model, and the change on the given text or dataset."""

    memory: dict[str, PartMemory]
    change: PredictionChange | None


def language_model_change(
    folder: str | pathlib.Path, texts: Sequence[str], *, length: int, most_tokens: int
) -> Int8Change:
    """Compares a language model as it is stored with itself in int8, on texts.

    Args:
      folder: as for `load_language_model`.
      texts: cut into rows; without any, the memory alone is measured.
      length: tokens of a row.
      most_tokens: of all texts together, shared evenly among them.

    Raises: UserError as `load_language_model`.
    """
    after, tokenizer = load_language_model(folder, weights="int8")
    memory = {"language_model": memory_of(after)}
    if not texts or tokenizer is None:
        return Int8Change(memory, None)
    before = load_language_model(folder).model
    rows = text_rows(tokenizer, texts, length, most_tokens)
    return Int8Change(memory, compare(before, after, rows))


def flamingo_change(folder: str | pathlib.Path, batches: Iterable[Batch]) -> Int8Change:
    """Compares an exported Flamingo as it is stored with itself in int8, on batches of
    `FlamingoTask`: the tokens that have a loss there, given the visuals.

    Raises: UserError as `load_flamingo`.
    """
    after = load_flamingo(folder, frozen_dtype="int8").model
    memory = {
        part: memory_of(getattr(after, part)) for part in ("vision_encoder", "language_model")
    }
    before = load_flamingo(folder).model
    return Int8Change(memory, compare(before, after, batches))


def memory_of(part: nnx.Module) -> PartMemory:
    """Counts the memory of an int8 part's arrays, and of as many parameters in bfloat16."""
    arrays = to_flat(nnx.state(part))
    count = sum(array.size for name, array in arrays.items() if is_multiplied(name))
    held = sum(shard.data.nbytes for a in arrays.values() for shard in a.addressable_shards)
    return PartMemory(count, 2 * count, held)


def text_rows(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, most_tokens: int
) -> Iterator[Batch]:
    """Cuts texts into rows of `length` tokens, each a batch of `LanguageModellingTask` that
    begins with the tokenizer's beginning of text. What does not fill a row is left out.
    """
    each = most_tokens // len(texts)
    for text in texts:
        # Four characters a token is common; tokenizing all of a book would take minutes.
        tokens = tokenizer.encode(text[: 16 * each])[:each]
        for start in range(0, len(tokens) - length + 2, length - 1):
            row = np.array([[tokenizer.bos, *tokens[start : start + length - 1]]], np.int32)
            yield {
                "tokens": row,
                "positions": np.arange(row.shape[1], dtype=np.int32)[None],
                "segments": np.ones_like(row),
                "loss_mask": np.ones(row.shape, bool),
            }


def compare(before: Any, after: Any, batches: Iterable[Batch]) -> PredictionChange:
    """Compares the predictions of two models, both language models or both Flamingos, at the
    tokens that have a loss.
    """
    graphs, states = zip(*(nnx.split(model) for model in (before, after)), strict=True)
    found = [jax.device_get(_compare(graphs, states, dict(batch))) for batch in batches]
    kept: dict[str, np.ndarray] = {
        name: np.concatenate([np.asarray(part[name])[part["counts"]] for part in found])
        for name in (found[0] if found else ())
    }
    if not found or not kept["counts"].size:
        raise UserError("the text or dataset has no token to predict: name a longer one")
    return PredictionChange(
        kept["counts"].size,
        math.exp(kept["loss"].mean(dtype=np.float64)),
        math.exp(kept["int8_loss"].mean(dtype=np.float64)),
        float(kept["divergence"].mean(dtype=np.float64)),
        float(np.quantile(kept["divergence"], 0.99)),
        float(kept["divergence"].max()),
        float(kept["difference"].max()),
        float(kept["same"].mean(dtype=np.float64)),
    )


@functools.partial(jax.jit, static_argnums=0)
def _compare(graphs: Any, states: Any, batch: Any) -> dict[str, jax.Array]:
    """Compares each prediction [B, L - 1]: both losses, the divergence, the largest difference
    of a logit, whether the choice is the same; `counts` says where there is a target.
    """
    if "frame_mask" in batch:
        batch = masked_batch(batch)
    before, after = (
        _logits(nnx.merge(graph, state), batch)[:, :-1]
        for graph, state in zip(graphs, states, strict=True)
    )
    p, q = jax.nn.log_softmax(before), jax.nn.log_softmax(after)
    targets = batch["tokens"][:, 1:, None]
    loss, int8_loss = (-jnp.take_along_axis(x, targets, -1)[..., 0] for x in (p, q))
    return {
        "counts": target_mask(batch),
        "loss": loss,
        "int8_loss": int8_loss,
        "divergence": (jnp.exp(p) * (p - q)).sum(-1),
        "difference": jnp.abs(before - after).max(-1),
        "same": before.argmax(-1) == after.argmax(-1),
    }


def _logits(model: Any, batch: Batch) -> jax.Array:
    """Computes the logits of a batch, float32 [B, L, V]."""
    text = batch["tokens"], batch["positions"], batch["segments"]
    if isinstance(model, LanguageModel):
        return model(*text)
    visuals = None
    if "visuals" in batch:
        visuals = model.encode_visuals(batch["images"], batch["frame_mask"])
    logits: jax.Array = model(*text, batch["media_index"], visuals, batch.get("visuals"))
    return logits
