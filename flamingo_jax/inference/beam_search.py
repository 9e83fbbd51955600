"""Beam search: a jittable `lax.while_loop` over a cache of fixed size, which the hypotheses of a
prompt share.

A row ends at its first stop token (paper: the first <EOC>), the loop when every row has ended.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flamingo_jax.inference.decoding import (
    NO_TOKEN,
    DecodingConfig,
    TokenConstraints,
    next_logits,
    suppress,
)
from flamingo_jax.inference.prefill import DecodingModel, Prefilled, PromptArrays, prefill
from flamingo_jax.models import ops
from flamingo_jax.models.cache import Beams

Array = jax.Array


class Generated(NamedTuple):
    """The n best continuations of B prompts, the best first.

    tokens: int32 [B, n, T], without the stop token, padded with NO_TOKEN.
    score: float32 [B, n], log-probability, including the stop token; -inf where there is none.
    finished: bool [B, n], whether a stop token came within T tokens.
    """

    tokens: Array
    score: Array
    finished: Array


class _BeamState(NamedTuple):
    """The carry of beam search.

    token: int32 [B, beams], the next inputs. cache: of B rows, see `_beams`.
    path: bool [B, beams, T * beams], which of the new tokens' slots are of each hypothesis.
    tokens, score: [B, beams, T] and [B, beams], the open hypotheses, the likeliest first.
    closed, closed_score, closed_rank: [B, n, T], [B, n], [B, n], the n best closed hypotheses,
      their log-probabilities and their length-normalised ranks; -inf for none.
    """

    step: Array
    token: Array
    cache: Any
    path: Array
    tokens: Array
    score: Array
    closed: Array
    closed_score: Array
    closed_rank: Array


def beam_search(
    model: DecodingModel,
    prompts: PromptArrays,
    media: Any,
    decoding: DecodingConfig,
    constraints: TokenConstraints,
) -> Generated:
    """Generates by beam search: keeps the `beam_size` likeliest open hypotheses of every row,
    and the `n_best` best closed ones (which have ended with a stop token).

    As is common, a hypothesis closes only if its stop token is among the `beam_size` likeliest
    continuations, so that a beam of one is greedy search. A row is done when no open
    hypothesis can still outrank the closed ones. A row with too few closed hypotheses at the
    end returns its likeliest open ones after them.

    Args:
      media: of `Flamingo.prepare_media`; None without visuals.
    """
    rows, beams, length = prompts.tokens.shape[0], decoding.beam_size, decoding.max_tokens
    read = prompts.slots
    prefilled = prefill(model, prompts, media, read + length * beams, read + length)
    if prefilled.visuals is not None:
        media, visuals = media.of_rows(prefilled.visuals)
        prefilled = prefilled._replace(visuals=visuals)

    def body(s: _BeamState) -> _BeamState:
        positions = jnp.broadcast_to((prefilled.position + s.step)[:, None], s.token.shape)
        now = _beams(prefilled, s.step, s.path, read)
        logits, cache = next_logits(
            model,
            s.token,
            positions,
            prefilled.media_index,
            media,
            prefilled.visuals,
            s.cache,
            now,
        )
        continuations = _continuations(s, logits, constraints)
        s = _keep_closed(s, continuations, beams, decoding.length_penalty)
        return _keep_open(s._replace(cache=cache, path=now.seen[..., read:]), continuations)

    def goes_on(s: _BeamState) -> Array:
        # An upper bound on the rank that an open hypothesis can reach: log-probabilities only
        # fall, and a positive length penalty favours the longest.
        tokens = length if decoding.length_penalty > 0 else s.step + 1
        reach = s.score[:, 0] / _length_norm(tokens, decoding.length_penalty)
        return (s.step < length) & jnp.any(reach > s.closed_rank[:, -1])

    none = jnp.full((rows, decoding.n_best), -jnp.inf)
    # At first all hypotheses are the same prompt: all but one get -inf, or they would branch
    # into the same continuations.
    score = jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf), (rows, 1))
    first = _BeamState(
        jnp.int32(0),
        jnp.broadcast_to(prefilled.last[:, None], (rows, beams)),
        prefilled.cache,
        jnp.zeros((rows, beams, length * beams), bool),
        jnp.full((rows, beams, length), NO_TOKEN, jnp.int32),
        score,
        jnp.full((rows, decoding.n_best, length), NO_TOKEN, jnp.int32),
        none,
        none,
    )
    last = jax.lax.while_loop(goes_on, body, first)
    # The closed hypotheses, then the open ones in the places that are left.
    finished = last.closed_rank > -jnp.inf
    left = jnp.arange(decoding.n_best) - finished.sum(1, keepdims=True)
    opened = jnp.maximum(left, 0)
    return Generated(
        jnp.where(finished[..., None], last.closed, _pick(last.tokens, opened)),
        jnp.where(finished, last.closed_score, _pick(last.score, opened)),
        finished,
    )


def _beams(prefilled: Prefilled, step: Array, path: Array, read: int) -> Beams:
    """Describes how the next tokens of all hypotheses continue their prompts, whose tokens are in
    the first `read` slots: the tokens of step t are in the slots from read + t * beams on.
    """
    rows, beams, count = path.shape
    own = step * beams + jnp.arange(beams)
    path = path | (jnp.arange(count) == own[:, None])
    start = prefilled.position[:, None]
    before = jnp.broadcast_to(jnp.arange(read), (rows, read))
    seen = jnp.broadcast_to((before < start)[:, None], (rows, beams, read))
    return Beams(
        jnp.broadcast_to(read + own, (rows, beams)),
        jnp.concatenate([before, start + jnp.arange(count) // beams], axis=1),
        jnp.concatenate([seen, path], axis=-1),
    )


def _pick(arrays: Array, which: Array) -> Array:
    """Picks hypotheses of every row: arrays [B, beams, ...], which int32 [B, n] -> [B, n, ...]."""
    return jnp.take_along_axis(
        arrays, which.reshape(*which.shape, *[1] * (arrays.ndim - 2)), axis=1
    )


class _Continuations(NamedTuple):
    """The C likeliest hypotheses that are one token longer, arrays [B, C], the best first."""

    score: Array
    parent: Array
    """The beam that it continues."""
    token: Array
    stops: Array
    """Whether the token is a stop token."""


def _continuations(s: _BeamState, logits: Array, constraints: TokenConstraints) -> _Continuations:
    """Finds the likeliest continuations of all hypotheses.

    Each hypothesis has one continuation per stop token, so beams * (1 + stop tokens) are
    taken: enough for `beams` open ones to remain.

    logits: of the next tokens, float32 [B, beams, V].
    """
    rows, beams, size = logits.shape
    count = min(beams * (1 + len(constraints.stop)), beams * size)
    # Of each hypothesis first: by its logits, of which only those found become log-probabilities.
    best, token = ops.top_k(suppress(logits, constraints.suppressed), min(count, size))
    best += (s.score - jax.nn.logsumexp(logits, axis=-1))[..., None]
    score, place = ops.top_k(best.reshape(rows, -1), count)
    token = jnp.take_along_axis(token.reshape(rows, -1), place, axis=1)
    stops = jnp.isin(token, jnp.array(constraints.stop))
    return _Continuations(score, place // best.shape[-1], token, stops)


def _keep_closed(
    s: _BeamState, found: _Continuations, beams: int, length_penalty: float
) -> _BeamState:
    """Keeps the best of the closed hypotheses and of the closing continuations."""
    # Only a stop token among the `beams` best continuations may close a hypothesis.
    score, parent, stops = (a[:, :beams] for a in (found.score, found.parent, found.stops))
    # Of a hypothesis that two stop tokens close, the likelier: the text is the same.
    same = (parent[:, :, None] == parent[:, None, :]) & stops[:, None, :]
    repeated = jnp.tril(same, -1).any(-1)
    rank = jnp.where(stops & ~repeated, score / _length_norm(s.step + 1, length_penalty), -jnp.inf)
    # Those of before come first, and stay where ranks are equal.
    ranks = jnp.concatenate([s.closed_rank, rank], 1)
    ranks, which = ops.top_k(ranks, s.closed_rank.shape[1])
    return s._replace(
        closed=_pick(jnp.concatenate([s.closed, _pick(s.tokens, parent)], 1), which),
        closed_score=_pick(jnp.concatenate([s.closed_score, score], 1), which),
        closed_rank=ranks,
    )


def _keep_open(s: _BeamState, found: _Continuations) -> _BeamState:
    """Makes the likeliest continuations without a stop token the open hypotheses, with their
    parents' paths.
    """
    score, kept = ops.top_k(jnp.where(found.stops, -jnp.inf, found.score), s.score.shape[1])
    parent, token = _pick(found.parent, kept), _pick(found.token, kept)
    return s._replace(
        step=s.step + 1,
        token=token,
        path=_pick(s.path, parent),
        tokens=_pick(s.tokens, parent).at[:, :, s.step].set(token),
        score=score,
    )


def _length_norm(tokens: Array | int, length_penalty: float) -> Array | float:
    """Computes the length normalisation of a hypothesis's log-probability (Wu et al. 2016)."""
    return ((5.0 + tokens) / 6.0) ** length_penalty
