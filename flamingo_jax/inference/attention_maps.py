"""What a model looked at as it wrote an answer: for each token the visual that phi names, the
cross-attention to that visual's tokens, and through the resampler to the cells of its grid.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.prompts import (
    Prompt,
    TokenisedPrompt,
    bucket_length,
    tokenise,
    visual_slots,
)
from flamingo_jax.models.packing import PackedText
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.visuals import Visual

Array = jax.Array
ALTERNATIVES = 8
"""How many of the likeliest tokens are listed at each place."""
EOC, EOS = "<EOC>", "<EOS>"
"""What tokens without a text are called."""


@dataclasses.dataclass(frozen=True)
class TokenProbability:
    """A token at some place of an answer: its text, id and log-probability."""

    text: str
    token: int
    log_probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaps:
    """What a model attended to as it predicted each of an answer's A tokens.

    A token is predicted at the place before it, so that its attention is that of the token
    before: of the prompt's last for the answer's first.

    tokens: the answer's tokens, as the model's own distribution has them.
    alternatives: for each of these the likeliest tokens at its place, the likeliest first.
    media_index: int32 [A], phi: which of `visuals` the tokens were conditioned on, -1 for none.
    visuals: the prompt's N visuals, as the model saw them.
    cross_attention: float32 [blocks, A, N, R], the weight that each cross-attention block gives
      each of a visual's R tokens, averaged over heads. For each block and token it sums to 1;
      to 0 where no visual was seen, to less than 1 where text shares the softmax
      (`conditioning.text_window`).
    grids: for each visual float32 [R, T, h, w], which cells of which frame each visual token
      comes from: the resampler's attention rollout (`Resampler.rollout`). Each sums to 1.
    """

    tokens: tuple[TokenProbability, ...]
    alternatives: tuple[tuple[TokenProbability, ...], ...]
    media_index: np.ndarray
    visuals: tuple[Visual, ...]
    cross_attention: np.ndarray
    grids: tuple[np.ndarray, ...]

    @property
    def blocks(self) -> int:
        """Returns the number of cross-attention blocks."""
        return self.cross_attention.shape[0]

    def shares(self, token: int, block: int | None = None) -> np.ndarray:
        """Computes how much of a token's attention each visual got: float32 [N].

        block: one cross-attention block; None for the mean of all.
        """
        return self._weights(token, block).sum(-1)

    def heat(self, token: int, visual: int, block: int | None = None) -> np.ndarray:
        """Computes where in a visual a token looked: float32 [T, h, w] over the frames and the
        encoder's grid, summing to the visual's share.

        Args:
          token, visual: indices into `tokens` and `visuals`.
          block: one cross-attention block; None for the mean of all.
        """
        weights = self._weights(token, block)[visual]
        return np.einsum("r,rthw->thw", weights, self.grids[visual])

    def _weights(self, token: int, block: int | None) -> np.ndarray:
        weights = self.cross_attention[:, token]
        return weights.mean(0) if block is None else weights[block]


def attention_maps(engine: Engine, prompt: Prompt, answer: str | Sequence[int]) -> AttentionMaps:
    """Reads a prompt with its answer once, and records what the answer's tokens attended to.

    answer: the text that follows the prompt, or its token ids (`Completion.tokens`), so that
      the tokens are those that were generated.

    Raises: UserError for an answer without tokens, or with ids that the model lacks, and as
      `Engine.generate`.
    """
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(answer) if isinstance(answer, str) else [int(n) for n in answer]
    if not ids:
        raise UserError("the answer has no tokens: give a text that follows the prompt")
    if wrong := [number for number in ids if not 0 <= number < engine.vocabulary]:
        raise UserError(
            f"the answer has the token id {wrong[0]}, but the model's go from 0 to"
            f" {engine.vocabulary - 1}: give ids of its own tokenizer"
        )
    tokenised = tokenise(prompt, tokenizer)
    engine.check([tokenised], len(ids))
    visuals = tokenised.visuals
    text, places = _padded(tokenised, ids, tokenizer.pad)
    if not visuals:
        # The model is run as with a visual that no token attends to.
        blank = (1, engine.config.resampler.latents, engine.config.language_model.width)
        visual_tokens, grids = np.zeros(blank, np.float32), []
    else:
        visual_tokens, grids = engine.visual_tokens(visuals), _rollouts(engine, visuals)
        spare = text.visuals.shape[1] - len(visuals)
        visual_tokens = np.pad(visual_tokens, ((0, spare), (0, 0), (0, 0)))
    logits, weights = engine.run(_read, text, visual_tokens.astype(engine.dtype), places)
    weights = weights[:, 0, : len(ids), : len(visuals)]
    tokens, alternatives = _probabilities(engine, ids, logits[0, : len(ids)])
    return AttentionMaps(
        tokens,
        alternatives,
        text.media_index[0, places[0, : len(ids)]],
        tuple(visuals),
        weights,
        tuple(grids),
    )


def _rollouts(engine: Engine, visuals: Sequence[Visual]) -> list[np.ndarray]:
    """Computes where each visual's tokens come from: float32 [R, T, h, w] over its frames and
    the encoder's grid.
    """
    by_digest = {visual.digest: visual for visual in visuals}
    found = dict(engine.encode_visuals(list(by_digest.values()), _rollout))
    return [_grid(found[visual.digest], len(visual.frames)) for visual in visuals]


def _grid(rollout: np.ndarray, frames: int) -> np.ndarray:
    """Reshapes a rollout [R, T, cells] to [R, frames, h, w], without padding frames."""
    side = math.isqrt(rollout.shape[-1])
    return rollout[:, :frames].reshape(len(rollout), frames, side, side)


@functools.partial(jax.jit, static_argnames="graph")
def _rollout(graph: Any, state: nnx.State, images: Array, frame_mask: Array) -> Array:
    """Computes which grid cells each visual token comes from: float32 [M, R, T, S]."""
    model = nnx.merge(graph, state)
    return model.resampler.rollout(model.encode_images([images])[0], frame_mask)


@functools.partial(jax.jit, static_argnames="graph")
def _read(
    graph: Any, state: nnx.State, text: PackedText, visual_tokens: Array, places: Array
) -> tuple[Array, Array]:
    return nnx.merge(graph, state).cross_attention(text, visual_tokens, places)


def _padded(
    prompt: TokenisedPrompt, answer: Sequence[int], pad_token: int
) -> tuple[Any, np.ndarray]:
    """Makes one padded row of a prompt and its answer, and int32 [1, P], the places that
    predict the answer's tokens; P is padded too, so that few shapes are compiled.
    """
    start, end = len(prompt.tokens), len(prompt.tokens) + len(answer)
    length = bucket_length(end)
    tokens = np.full((1, length), pad_token, np.int32)
    index = np.full((1, length), -1, np.int32)
    tokens[0, :start], tokens[0, start:end] = prompt.tokens, answer
    index[0, :start], index[0, start:end] = prompt.media_index, prompt.media_index[-1]
    segments = (np.arange(length) < end).astype(np.int32)[None]
    visuals = np.full((1, visual_slots(max(len(prompt.visuals), 1))), -1, np.int32)
    visuals[0, : len(prompt.visuals)] = range(len(prompt.visuals))
    places = np.minimum(start - 1 + np.arange(bucket_length(len(answer))), length - 1)
    positions = np.where(segments, np.arange(length, dtype=np.int32), 0)
    arrays: Any = (tokens, positions, segments, index, visuals)  # Of numpy: jit moves them.
    return PackedText(*arrays), places.astype(np.int32)[None]


def _probabilities(
    engine: Engine, ids: Sequence[int], logits: np.ndarray
) -> tuple[tuple[TokenProbability, ...], tuple[tuple[TokenProbability, ...], ...]]:
    """Lists an answer's tokens, and the likeliest ones at each of their places.

    logits: float32 [A, V + extra].
    """
    logits = logits.astype(np.float64)
    most = logits.max(-1, keepdims=True)
    log_probabilities = logits - most - np.log(np.exp(logits - most).sum(-1, keepdims=True))
    allowed = log_probabilities.copy()
    allowed[:, list(engine.suppressed)] = -math.inf
    order = np.argsort(-allowed, axis=-1, kind="stable")[:, :ALTERNATIVES]
    texts = token_texts(ids, engine.tokenizer)
    found = tuple(
        TokenProbability(text, number, float(log_probabilities[place, number]))
        for place, (text, number) in enumerate(zip(texts, ids, strict=True))
    )
    others = tuple(
        tuple(
            TokenProbability(
                _text_of(int(number), engine.tokenizer), int(number), float(row[number])
            )
            for number in numbers
            if row[number] > -math.inf
        )
        for row, numbers in zip(allowed, order, strict=True)
    )
    return found, others


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Splits the text of token ids into one part for each token.

    A token that ends within a character gets no text; the one that completes it gets it all.
    """
    texts, before = [], ""
    for count in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:count])
        if whole.endswith("\ufffd") and count < len(ids):
            whole = before
        texts.append(whole[len(before) :])
        before = whole
    return texts


def _text_of(number: int, tokenizer: Tokenizer) -> str:
    """Returns the text of a token alone, or the name of a special one."""
    if number in (tokenizer.eoc, tokenizer.eos):
        return EOC if number == tokenizer.eoc else EOS
    return tokenizer.decode([number])
