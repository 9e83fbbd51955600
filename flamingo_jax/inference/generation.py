"""Text generation: greedy, nucleus sampling and beam search. Each is a jittable
`lax.while_loop` over a cache of fixed size.

A row ends at its first stop token (paper: the first <EOC>), the loop when every row has ended.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flamingo_jax.errors import UserError
from flamingo_jax.inference.prefill import DecodingModel, Prefilled, PromptArrays, prefill
from flamingo_jax.models.attention import map_cache

Array = jax.Array
NO_TOKEN = -1
"""Padding after a row's end in `Generated.tokens`."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """The decoding method and its options.

    The paper uses a beam of 3 for open-ended tasks, and mentions no length penalty.

    Raises: UserError for a value out of range, or for beam search together with sampling.
    """

    max_tokens: int = 32
    beam_size: int = 1
    """Hypotheses of beam search; 1 for greedy decoding or sampling."""
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token (greedy)."""
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al. 2020): samples only from the likeliest tokens that
    together have this probability.
    """
    length_penalty: float = 0.0
    """Beam search ranks hypotheses of n tokens by log-probability / ((5 + n) / 6) **
    length_penalty (Wu et al. 2016); 0 for none.
    """

    def __post_init__(self) -> None:
        for name in ("max_tokens", "beam_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if not 0.0 <= self.temperature < math.inf or not math.isfinite(self.length_penalty):
            raise UserError(
                f"temperature is {self.temperature} and length_penalty {self.length_penalty}:"
                " they must be finite, and temperature 0 or more"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(
                f"top_p is {self.top_p}: it must be above 0, which would allow no token, and at"
                " most 1; temperature 0 takes the likeliest token"
            )
        if self.beam_size > 1 and self.temperature > 0:
            raise UserError(
                f"a beam of {self.beam_size} does not sample: leave temperature at 0, or set"
                " beam_size to 1"
            )


@dataclasses.dataclass(frozen=True)
class TokenConstraints:
    """Token ids that end a row, and ids that are never generated, such as <BOS>, padding and
    the image tag.
    """

    stop: tuple[int, ...]
    suppressed: tuple[int, ...] = ()


class Generated(NamedTuple):
    """The continuations of B prompts.

    tokens: int32 [B, T], without the stop token, padded with NO_TOKEN.
    score: float32 [B], log-probability, including the stop token.
    finished: bool [B], whether a stop token came within T tokens.
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
    """Generates at most `decoding.max_tokens` tokens after each prompt.

    Args:
      media: of `Flamingo.prepare_media`; None without visuals.
      keys: PRNG keys [B], one per row, for sampling.
    """
    prefilled = prefill(model, prompts, media, prompts.tokens.shape[1] + decoding.max_tokens)
    if decoding.beam_size > 1:
        return _beam_search(model, prefilled, media, decoding, constraints)
    return _sample(model, prefilled, media, keys, decoding, constraints)


class _SamplingState(NamedTuple):
    """The carry of the sampling loop: `token` [B] is the next input, `tokens` [B, T] the
    output so far.
    """

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
    """Generates greedily or by sampling, one token per row at each iteration."""
    rows = prefilled.last.shape[0]

    def body(s: _SamplingState) -> _SamplingState:
        log_probabilities, cache = _next_log_probabilities(
            model, prefilled, media, s.token, s.step, s.cache
        )
        allowed = _suppress(log_probabilities, constraints.suppressed)
        token = _pick_token(
            allowed, jax.vmap(jax.random.fold_in, (0, None))(keys, s.step), decoding
        )
        # The score is of the model's own distribution, before temperature and nucleus.
        gained = jnp.take_along_axis(log_probabilities, token[:, None], axis=1)[:, 0]
        # Rows that have ended go on until all have; their tokens are not recorded.
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
    """Picks the next tokens, the likeliest or sampled ones: [B, V] -> int32 [B]."""
    if decoding.temperature == 0.0:
        return jnp.argmax(log_probabilities, axis=-1).astype(jnp.int32)
    logits = log_probabilities / decoding.temperature
    if decoding.top_p < 1.0:
        logits = nucleus(logits, decoding.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: Array, top_p: float) -> Array:
    """Sets logits [B, V] to -inf outside the nucleus, the smallest set of likeliest tokens
    whose probabilities sum to `top_p` or more.
    """
    descending = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    # The probability of all likelier tokens: a token is in the nucleus if it is below top_p.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


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


def _beam_search(
    model: DecodingModel,
    prefilled: Prefilled,
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
    """
    rows, beams, length = prefilled.last.shape[0], decoding.beam_size, decoding.max_tokens
    prefilled = prefilled.repeat(beams)

    def body(s: _BeamState) -> _BeamState:
        log_probabilities, cache = _next_log_probabilities(
            model, prefilled, media, s.token, s.step, s.cache
        )
        allowed = _suppress(log_probabilities, constraints.suppressed)
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


def _next_log_probabilities(
    model: DecodingModel, prefilled: Prefilled, media: Any, token: Array, step: Array, cache: Any
) -> tuple[Array, Any]:
    """Decodes `token` [B], the step-th after the prompt's last -> log-probabilities of the
    next token, float32 [B, V], and the cache with it added.
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
    """Sets the log-probabilities [B, V] of tokens that may not be generated to -inf."""
    return (
        log_probabilities.at[:, jnp.array(suppressed, jnp.int32)].set(-jnp.inf)
        if suppressed
        else log_probabilities
    )
