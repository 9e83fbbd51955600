"""Text after a prompt: greedy, nucleus sampling and beam search, each one jittable while loop
over a static cache.

The loop ends as soon as every row has; a row ends at the first stop token (paper: the first
<EOC>).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flamingo_jax.inference.prefill import DecodingModel, Prefilled, PromptArrays, prefill
from flamingo_jax.models.attention import map_cache

Array = jax.Array
NO_TOKEN = -1
"""Fills the places after a row's end."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How to continue a prompt.

    The paper's open-ended tasks use a beam_size of 3 (facts 6.4); it names no length penalty.
    """

    max_tokens: int = 32
    beam_size: int = 1
    """Hypotheses of beam search; 1 samples."""
    temperature: float = 0.0
    """0 takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al. 2020): only the likeliest tokens that together have
    this probability.
    """
    length_penalty: float = 0.0
    """A hypothesis of n tokens ranks by its log-probability over ((5 + n) / 6) **
    length_penalty (Wu et al. 2016); 0 for none.
    """


@dataclasses.dataclass(frozen=True)
class TokenConstraints:
    """stop: ids that end a row. suppressed: ids that are not generated, such as <BOS>, padding and
    the image tag.
    """

    stop: tuple[int, ...]
    suppressed: tuple[int, ...] = ()


class Generated(NamedTuple):
    """tokens int32 [B, T] without the stop token, filled with -1; score float32 [B],
    log-probability including the stop token; finished bool [B]: a stop token came within T
    tokens.
    """

    tokens: Array
    score: Array
    finished: Array


def generate(
    model: DecodingModel,
    prompts: PromptArrays,
    media: Any,
    keys: Array,
    decoding: DecodingConfig,
    constraints: TokenConstraints,
) -> Generated:
    """At most `decoding.max_tokens` tokens after each prompt; `keys` [B], one PRNG key a row,
    matter to sampling only.
    """
    prefilled = prefill(model, prompts, media, prompts.tokens.shape[1] + decoding.max_tokens)
    if decoding.beam_size > 1:
        return _beam_search(model, prefilled, media, decoding, constraints)
    return _sample(model, prefilled, media, keys, decoding, constraints)


class _SamplingState(NamedTuple):
    step: Array
    token: Array
    cache: Any
    tokens: Array
    score: Array
    finished: Array


def _sample(
    model: DecodingModel,
    prefilled: Prefilled,
    media: Any,
    keys: Array,
    decoding: DecodingConfig,
    constraints: TokenConstraints,
) -> Generated:
    rows = prefilled.last.shape[0]

    def body(s: _SamplingState) -> _SamplingState:
        log_probabilities, cache = _next_log_probabilities(
            model, prefilled, media, s.token, s.step, s.cache
        )
        allowed = _suppress(log_probabilities, constraints.suppressed)
        token = _pick_token(
            allowed, jax.vmap(jax.random.fold_in, (0, None))(keys, s.step), decoding
        )
        gained = jnp.take_along_axis(log_probabilities, token[:, None], axis=1)[:, 0]
        stops = jnp.isin(token, jnp.array(constraints.stop))
        written = jnp.where(s.finished | stops, NO_TOKEN, token)
        return _SamplingState(
            s.step + 1,
            token,
            cache,
            s.tokens.at[:, s.step].set(written),
            s.score + jnp.where(s.finished, 0.0, gained),
            s.finished | stops,
        )

    first = _SamplingState(
        jnp.int32(0),
        prefilled.last,
        prefilled.cache,
        jnp.full((rows, decoding.max_tokens), NO_TOKEN, jnp.int32),
        jnp.zeros(rows),
        jnp.zeros(rows, bool),
    )
    last = jax.lax.while_loop(
        lambda s: (s.step < decoding.max_tokens) & ~s.finished.all(), body, first
    )
    return Generated(last.tokens, last.score, last.finished)


def _pick_token(log_probabilities: Array, keys: Array, decoding: DecodingConfig) -> Array:
    """[B, V] -> int32 [B]."""
    if decoding.temperature == 0.0:
        return jnp.argmax(log_probabilities, axis=-1).astype(jnp.int32)
    logits = log_probabilities / decoding.temperature
    if decoding.top_p < 1.0:
        logits = nucleus(logits, decoding.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: Array, top_p: float) -> Array:
    """Logits [B, V] with -inf outside the smallest set of likeliest tokens whose probabilities
    reach `top_p`.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


class _BeamState(NamedTuple):
    step: Array
    token: Array
    cache: Any
    tokens: Array
    score: Array
    best: Array
    best_score: Array
    best_rank: Array


def _beam_search(
    model: DecodingModel,
    prefilled: Prefilled,
    media: Any,
    decoding: DecodingConfig,
    constraints: TokenConstraints,
) -> Generated:
    """Keeps the `beam_size` likeliest open hypotheses of every row, and the best closed one.

    As in common practice a hypothesis may close only where its stop token is among the `beam_size`
    likeliest continuations, which makes a beam of one greedy search. A row is done when none of
    its open hypotheses can still overtake its closed one. A row with no closed hypothesis at
    the end gives its likeliest open one.
    """
    rows, beams, length = prefilled.last.shape[0], decoding.beam_size, decoding.max_tokens
    stop = jnp.array(constraints.stop)
    prefilled = prefilled.repeat(beams)

    def normaliser(tokens: Array | int) -> Array:
        return ((5.0 + tokens) / 6.0) ** decoding.length_penalty

    def body(s: _BeamState) -> _BeamState:
        log_probabilities, cache = _next_log_probabilities(
            model, prefilled, media, s.token, s.step, s.cache
        )
        allowed = _suppress(log_probabilities, constraints.suppressed).reshape(rows, beams, -1)
        size = allowed.shape[-1]
        # A hypothesis has as many closing continuations as there are stop tokens: so many are
        # taken that `beams` open ones remain.
        wide = min(beams * (1 + len(constraints.stop)), beams * size)
        score, flat = jax.lax.top_k((s.score[:, :, None] + allowed).reshape(rows, -1), wide)
        parent, token = flat // size, (flat % size).astype(jnp.int32)
        stops = jnp.isin(token, stop)

        closing = jnp.where(
            stops & (jnp.arange(wide) < beams), score / normaliser(s.step + 1), -jnp.inf
        )
        which = jnp.argmax(closing, axis=1, keepdims=True)
        rank = jnp.take_along_axis(closing, which, axis=1)[:, 0]
        better = rank > s.best_rank
        closed = jnp.take_along_axis(
            s.tokens, jnp.take_along_axis(parent, which, axis=1)[:, :, None], axis=1
        )[:, 0]
        best = jnp.where(better[:, None], closed, s.best)
        best_score = jnp.where(
            better, jnp.take_along_axis(score, which, axis=1)[:, 0], s.best_score
        )

        score, kept = jax.lax.top_k(jnp.where(stops, -jnp.inf, score), beams)
        parent, token = (jnp.take_along_axis(a, kept, axis=1) for a in (parent, token))
        tokens = (
            jnp.take_along_axis(s.tokens, parent[:, :, None], axis=1).at[:, :, s.step].set(token)
        )
        source = (jnp.arange(rows)[:, None] * beams + parent).reshape(-1)
        cache = map_cache(lambda a: jnp.take(a, source, axis=1), cache)
        return _BeamState(
            s.step + 1,
            token.reshape(-1),
            cache,
            tokens,
            score,
            best,
            best_score,
            jnp.where(better, rank, s.best_rank),
        )

    def goes_on(s: _BeamState) -> Array:
        # Log-probabilities only fall, and a positive length penalty favours the longest.
        reach = s.score[:, 0] / normaliser(length if decoding.length_penalty > 0 else s.step + 1)
        return (s.step < length) & jnp.any(reach > s.best_rank)

    nothing = jnp.full((rows, length), NO_TOKEN, jnp.int32)
    none = jnp.full(rows, -jnp.inf)
    # All hypotheses are the prompt at first: one alone may branch.
    score = jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (rows, 1))
    first = _BeamState(
        jnp.int32(0),
        prefilled.last,
        prefilled.cache,
        jnp.tile(nothing[:, None], (1, beams, 1)),
        score,
        nothing,
        none,
        none,
    )
    last = jax.lax.while_loop(goes_on, body, first)
    finished = last.best_score > -jnp.inf
    return Generated(
        jnp.where(finished[:, None], last.best, last.tokens[:, 0]),
        jnp.where(finished, last.best_score, last.score[:, 0]),
        finished,
    )


def _next_log_probabilities(
    model: DecodingModel, prefilled: Prefilled, media: Any, token: Array, step: Array, cache: Any
) -> tuple[Array, Any]:
    """Log-probabilities float32 [B, V] of what follows `token` [B], the step-th after the
    prompt's last.
    """
    logits, cache = model.decode(
        token[:, None],
        (prefilled.position + step)[:, None],
        prefilled.media_index[:, None],
        media,
        prefilled.visuals,
        cache,
    )
    return jax.nn.log_softmax(logits[:, 0]), cache


def _suppress(log_probabilities: Array, suppressed: tuple[int, ...]) -> Array:
    return (
        log_probabilities.at[:, jnp.array(suppressed, jnp.int32)].set(-jnp.inf)
        if suppressed
        else log_probabilities
    )
