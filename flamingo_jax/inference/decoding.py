"""The options of decoding, and the step that all methods share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.inference.prefill import DecodingModel
from flamingo_jax.models.cache import LINE, Continuation
from flamingo_jax.ranges import MAX_SEED

Array = jax.Array
NO_TOKEN = -1
"""Padding after a row's end."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """The decoding method and its options.

    The paper uses a beam of 3 for open-ended tasks, and mentions no length penalty.

    Raises: UserError for a value out of range, or for options that exclude each other.
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
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are cut from it."""
    n_best: int = 1
    """How many answers beam search returns for each prompt."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "beam_size", "n_best"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be 1 or more, a whole number")
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
        if self.n_best > self.beam_size:
            raise UserError(
                f"n_best is {self.n_best}, but a beam of {self.beam_size} finds {self.beam_size}"
                " answers: set beam_size to n_best or more"
            )


def stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Checks stop strings, one or several.

    Raises: UserError for one that is empty or no text.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise UserError(f"the stop string {text!r} must be a text of a character or more")
    return texts


def check_seed(seed: int) -> int:
    """Checks the seed of sampling.

    Raises: UserError where it is no int of 32 bits.
    """
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed!r}: it must be a whole number from 0 to {MAX_SEED}")
    return seed


@dataclasses.dataclass(frozen=True)
class TokenConstraints:
    """Token ids that end a row, and ids that are never generated, such as <BOS>, padding and
    the image tag.
    """

    stop: tuple[int, ...]
    suppressed: tuple[int, ...] = ()


def next_logits(
    model: DecodingModel,
    tokens: Array,
    positions: Array,
    media_index: Array,
    media: Any,
    visuals: Array | None,
    cache: Any,
    continuation: Continuation = LINE,
) -> tuple[Array, Any]:
    """Decodes `tokens` int32 [B, L] at `positions` [B, L] -> logits of the tokens after them,
    float32 [B, L, V], and the cache with them added.

    media_index: int32 [B]. media, visuals: of `PreparedVisuals.of_rows`; None without visuals.
    """
    return model.decode(
        tokens,
        positions,
        jnp.broadcast_to(media_index[:, None], tokens.shape),
        media,
        visuals,
        cache,
        continuation,
        rows_own_visuals=True,
    )


def suppress(logits: Array, suppressed: tuple[int, ...]) -> Array:
    """Sets the logits or log-probabilities [..., V] of tokens that may not be generated to -inf."""
    if not suppressed:
        return logits
    never = np.zeros(logits.shape[-1], bool)
    never[list(suppressed)] = True
    return jnp.where(never, -jnp.inf, logits)
