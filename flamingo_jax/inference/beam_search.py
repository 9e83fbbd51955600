"""Beam search: a jittable `lax.while_loop` over a cache of fixed size.

A row ends at its first stop token (paper: the first <EOC>), the loop when every row has ended.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flamingo_jax.inference.decoding import (
    NO_TOKEN,
    DecodingConfig,
    TokenConstraints,
    next_log_probabilities,
    suppress,
)
from flamingo_jax.inference.prefill import DecodingModel, PromptArrays, prefill
from flamingo_jax.models.attention import map_cache

Array = jax.Array


class Generated(NamedTuple):
    """The continuations of B prompts.

    tokens: int32 [B, T], without the stop token, padded with NO_TOKEN.
    score: float32 [B], log-probability, including the stop token.
    finished: bool [B], whether a stop token came within T tokens.
    """

    tokens: Array
    score: Array
    finished: Array


class _BeamState(NamedTuple):
    """The carry of beam search.

    token: int32 [B * beams], the next inputs. cache: of B * beams rows.
    tokens, score: [B, beams, T] and [B, beams], the open hypotheses, the likeliest first.
    best, best_score, best_rank: [B, T], [B], [B], the best closed hypothesis, its
      log-probability and its length-normalised rank.
    """

    step: Array
    token: Array
    cache: Any
    tokens: Array
    score: Array
    best: Array
    best_score: Array
    best_rank: Array


def beam_search(
    model: DecodingModel,
    prompts: PromptArrays,
    media: Any,
    decoding: DecodingConfig,
    constraints: TokenConstraints,
) -> Generated:
    """Generates by beam search: keeps the `beam_size` likeliest open hypotheses of every row,
    and the best closed one (which has ended with a stop token).

    As is common, a hypothesis closes only if its stop token is among the `beam_size` likeliest
    continuations, so that a beam of one is greedy search. A row is done when no open
    hypothesis can still outrank the closed one. A row without a closed hypothesis at the end
    returns its likeliest open one.

    Args:
      media: of `Flamingo.prepare_media`; None without visuals.
    """
    rows, beams, length = prompts.tokens.shape[0], decoding.beam_size, decoding.max_tokens
    prefilled = prefill(model, prompts, media, prompts.tokens.shape[1] + length)
    if prefilled.visuals is not None:
        media, visuals = media.of_rows(prefilled.visuals)
        prefilled = prefilled._replace(visuals=visuals)
    prefilled = prefilled.repeat(beams)

    def body(s: _BeamState) -> _BeamState:
        log_probabilities, cache = next_log_probabilities(
            model,
            s.token,
            prefilled.position + s.step,
            prefilled.media_index,
            media,
            prefilled.visuals,
            s.cache,
        )
        allowed = suppress(log_probabilities, constraints.suppressed)
        continuations = _continuations(s, allowed.reshape(rows, beams, -1), constraints.stop)
        s = _keep_best_closed(s, continuations, beams, decoding.length_penalty)
        return _keep_open(s, continuations, beams, cache)

    def goes_on(s: _BeamState) -> Array:
        # An upper bound on the rank that an open hypothesis can reach: log-probabilities only
        # fall, and a positive length penalty favours the longest.
        tokens = length if decoding.length_penalty > 0 else s.step + 1
        reach = s.score[:, 0] / _length_norm(tokens, decoding.length_penalty)
        return (s.step < length) & jnp.any(reach > s.best_rank)

    nothing = jnp.full((rows, length), NO_TOKEN, jnp.int32)
    none = jnp.full(rows, -jnp.inf)
    # At first all hypotheses are the same prompt: all but one get -inf, or they would branch
    # into the same continuations.
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


class _Continuations(NamedTuple):
    """The C likeliest hypotheses that are one token longer, arrays [B, C], the best first."""

    score: Array
    parent: Array
    """The beam that it continues."""
    token: Array
    stops: Array
    """Whether the token is a stop token."""


def _continuations(s: _BeamState, allowed: Array, stop: tuple[int, ...]) -> _Continuations:
    """Finds the likeliest continuations of all hypotheses.

    Each hypothesis has one continuation per stop token, so beams * (1 + stop tokens) are
    taken: enough for `beams` open ones to remain.

    allowed: log-probabilities of the next tokens, float32 [B, beams, V].
    """
    rows, beams, size = allowed.shape
    count = min(beams * (1 + len(stop)), beams * size)
    # The top over beams and vocabulary at once: index = beam * V + token.
    score, flat = jax.lax.top_k((s.score[:, :, None] + allowed).reshape(rows, -1), count)
    token = (flat % size).astype(jnp.int32)
    return _Continuations(score, flat // size, token, jnp.isin(token, jnp.array(stop)))


def _keep_best_closed(
    s: _BeamState, found: _Continuations, beams: int, length_penalty: float
) -> _BeamState:
    """Replaces the best closed hypothesis by the best closing continuation, where that ranks
    higher.
    """
    # Only a stop token among the `beams` best continuations may close a hypothesis.
    among_beams = jnp.arange(found.score.shape[1]) < beams
    rank = jnp.where(
        found.stops & among_beams, found.score / _length_norm(s.step + 1, length_penalty), -jnp.inf
    )
    which = jnp.argmax(rank, axis=1, keepdims=True)
    rank = jnp.take_along_axis(rank, which, axis=1)[:, 0]
    score = jnp.take_along_axis(found.score, which, axis=1)[:, 0]
    parent = jnp.take_along_axis(found.parent, which, axis=1)
    tokens = jnp.take_along_axis(s.tokens, parent[:, :, None], axis=1)[:, 0]
    better = rank > s.best_rank
    return s._replace(
        best=jnp.where(better[:, None], tokens, s.best),
        best_score=jnp.where(better, score, s.best_score),
        best_rank=jnp.where(better, rank, s.best_rank),
    )


def _keep_open(s: _BeamState, found: _Continuations, beams: int, cache: Any) -> _BeamState:
    """Makes the likeliest continuations without a stop token the open hypotheses, with their
    parents' rows of the cache.
    """
    score, kept = jax.lax.top_k(jnp.where(found.stops, -jnp.inf, found.score), beams)
    parent, token = (jnp.take_along_axis(a, kept, axis=1) for a in (found.parent, found.token))
    tokens = jnp.take_along_axis(s.tokens, parent[:, :, None], axis=1)
    # The parents' rows in the cache of B * beams rows.
    row = (jnp.arange(parent.shape[0])[:, None] * beams + parent).reshape(-1)
    return s._replace(
        step=s.step + 1,
        token=token.reshape(-1),
        cache=map_cache(lambda a: jnp.take(a, row, axis=1), cache),
        tokens=tokens.at[:, :, s.step].set(token),
        score=score,
    )


def _length_norm(tokens: Array | int, length_penalty: float) -> Array | float:
    """Computes the length normalisation of a hypothesis's log-probability (Wu et al. 2016)."""
    return ((5.0 + tokens) / 6.0) ** length_penalty
