"""Text after a prompt: greedy, nucleus sampling and beam search, each one jittable while loop
over a static cache.

The loop ends as soon as every row has; a row ends at the first stop token (paper: the first
<EOC>).
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
"""Fills the places after a row's end."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """How to continue a prompt.

    The paper's open-ended tasks use a beam of 3 (facts 6.4); it names no length penalty.

    Raises: UserError for a value out of range, or a beam that is asked to sample as well.
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
    """Ids that end a row, and ids that are not generated, such as <BOS>, padding and the image
    tag.
    """

    stop: tuple[int, ...]
    suppressed: tuple[int, ...] = ()


class Generated(NamedTuple):
    """What follows each of B prompts.

    tokens int32 [B, T] without the stop token, filled with -1; score float32 [B],
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
    """Writes at most `decoding.max_tokens` tokens after each prompt.

    keys: PRNG keys [B], one for each row, which matter to sampling only.
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
    """Takes the likeliest tokens or draws them: [B, V] -> int32 [B]."""
    if decoding.temperature == 0.0:
        return jnp.argmax(log_probabilities, axis=-1).astype(jnp.int32)
    logits = log_probabilities / decoding.temperature
    if decoding.top_p < 1.0:
        logits = nucleus(logits, decoding.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: Array, top_p: float) -> Array:
    """Puts -inf outside the smallest set of likeliest tokens whose probabilities reach `top_p`:
    logits [B, V].
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
        # Log-probabilities only fall, and a positive length penalty favours the longest.
        tokens = length if decoding.length_penalty > 0 else s.step + 1
        reach = s.score[:, 0] / _length_norm(tokens, decoding.length_penalty)
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


class _Continuations(NamedTuple):
    """The likeliest hypotheses that are a token longer, [B, C], the best first."""

    score: Array
    parent: Array
    """The beam that each continues."""
    token: Array
    stops: Array
    """Whether its token closes it."""


def _continuations(s: _BeamState, allowed: Array, stop: tuple[int, ...]) -> _Continuations:
    """Finds the likeliest ways to go on. allowed: log-probabilities float32 [B, beams, V] of each
    hypothesis's next token.

    A hypothesis has as many closing continuations as there are stop tokens: so many are taken
    that as many open ones as there are beams remain.
    """
    rows, beams, size = allowed.shape
    count = min(beams * (1 + len(stop)), beams * size)
    score, flat = jax.lax.top_k((s.score[:, :, None] + allowed).reshape(rows, -1), count)
    token = (flat % size).astype(jnp.int32)
    return _Continuations(score, flat // size, token, jnp.isin(token, jnp.array(stop)))


def _keep_best_closed(
    s: _BeamState, found: _Continuations, beams: int, length_penalty: float
) -> _BeamState:
    """Takes the best continuation that closes, where it ranks above the best one so far."""
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
    """Goes on with the likeliest continuations that do not close, and their parents' cache."""
    score, kept = jax.lax.top_k(jnp.where(found.stops, -jnp.inf, found.score), beams)
    parent, token = (jnp.take_along_axis(a, kept, axis=1) for a in (found.parent, found.token))
    tokens = jnp.take_along_axis(s.tokens, parent[:, :, None], axis=1)
    row = (jnp.arange(parent.shape[0])[:, None] * beams + parent).reshape(-1)
    return s._replace(
        step=s.step + 1,
        token=token.reshape(-1),
        cache=map_cache(lambda a: jnp.take(a, row, axis=1), cache),
        tokens=tokens.at[:, :, s.step].set(token),
        score=score,
    )


def _length_norm(tokens: Array | int, length_penalty: float) -> Array | float:
    """Returns what a hypothesis's log-probability is divided by to rank (Wu et al. 2016)."""
    return ((5.0 + tokens) / 6.0) ** length_penalty


def _next_log_probabilities(
    model: DecodingModel, prefilled: Prefilled, media: Any, token: Array, step: Array, cache: Any
) -> tuple[Array, Any]:
    """Reads `token` [B], the step-th after the prompt's last: log-probabilities float32 [B, V] of
    what follows it, and the cache with it.
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
