"""GATED XATTN-DENSE: how the frozen language model comes to see (paper 2.2, figure 4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flamingo_jax.experiment import ConditioningConfig
from flamingo_jax.models.attention import attend
from flamingo_jax.models.layers import (
    FeedForward,
    LayerNorm,
    fan_in_normal,
    gated_linear,
    linear,
    save_for_backward,
)
from flamingo_jax.models.packing import Parts, as_parts, join, split
from flamingo_jax.partitioning.constraints import all_gather, reduce_scatter, residual

Array = jax.Array


class Media(NamedTuple):
    """A gated block's keys and values of M visuals with R tokens each: [M, R, H, d]."""

    key: Array
    value: Array


def media_mask(
    media_index: Array,
    segments: Array | None,
    visuals: Array,
    tokens_per_visual: int,
    attend_to: str,
) -> Array:
    """Which visual tokens each text token sees: bool [B, 1, L, N * R].

    Args:
      media_index: int32 [B, L], phi: the place within the row's visuals, -1 for none.
      segments: int32 [B, L], or None where a row is one segment.
      visuals: int32 [B, N], -1 for an empty place.
      attend_to: "last" (paper): the visual phi alone; "all_previous": also those before it in
        the same segment.
    """
    places = jnp.arange(visuals.shape[1])
    mask = media_index[:, :, None] == places
    if attend_to == "all_previous":
        before = media_index[:, :, None] >= places
        if segments is not None:
            # A visual belongs to the segment of the tokens that look at it.
            owner = jnp.max(jnp.where(mask, segments[:, :, None], 0), axis=1)
            before = before & (owner[:, None, :] == segments[:, :, None])
        # Several segments may look at one visual, which then belongs to the last of them.
        mask = mask | before
    mask = mask & (visuals >= 0)[:, None, :]
    return jnp.repeat(mask, tokens_per_visual, axis=-1)[:, None]


class GatedCrossAttentionBlock(nnx.Module):
    """y += tanh(a) * CrossAttn(LN(y), LN(X)); y += tanh(b) * FFW(LN(y)), with both gates 0 at
    the start (unless `config.gate_init`).

    One LayerNorm serves keys and values (paper v1, 3.1.2); no part that follows the attention
    has a bias, so that a token with no visual gets exactly zero from it.
    """

    def __init__(self, config: ConditioningConfig, width: int, *, rngs: nnx.Rngs):
        shape = (width, config.heads, config.head_width)
        self.attention_norm = LayerNorm(width)
        self.media_norm = LayerNorm(width)
        self.query = fan_in_normal(rngs, shape)
        self.key = fan_in_normal(rngs, shape)
        self.value = fan_in_normal(rngs, shape)
        self.out = fan_in_normal(
            rngs,
            (*shape[1:], width),
            config.heads * config.head_width,
            config.out_scale,
        )
        self.attention_gate = nnx.Param(jnp.full((), config.gate_init))
        self.dense_norm = LayerNorm(width)
        self.feed_forward = FeedForward(width, config.feed_forward, "squared_relu", rngs=rngs)
        self.feed_forward.down[...] *= config.out_scale
        self.dense_gate = nnx.Param(jnp.full((), config.gate_init))

    def project_visuals(self, visual_tokens: Array) -> Media:
        """[M, R, D] -> keys and values, once per visual however many rows look at it."""
        x = self.media_norm(visual_tokens)
        # One of the two: both together are the most memory for the least that is computed
        # again.
        return Media(save_for_backward(linear(x, self.key[...])), linear(x, self.value[...]))

    def attend(
        self, y: Array, media: Media | None, visuals: Array | None, mask: Array | Parts | None
    ) -> Array:
        """y [B, L, D], mask from `media_mask` -> [B, L, D].

        visuals int32 [B, N] are each row's visuals as places in `media`; None: row b owns the
        b-th N of them, and nothing is gathered.
        media None: there is nothing to see. For a stream [S, T, D] of several datasets: their
        masks, and media [S, V, R, H, d], all of a group's visuals, dataset after dataset.
        """
        if media is not None:
            query = save_for_backward(linear(all_gather(self.attention_norm(y)), self.query[...]))
            assert mask is not None
            masks = as_parts(mask)
            if visuals is not None:
                media = Media(*(m[visuals] for m in media))
            own = [(m.shape[0], m.shape[-1] // media.key.shape[-3]) for m in masks]
            keys, values = (split(m, own) for m in media)
            queries = split(query, [(m.shape[0], m.shape[2]) for m in masks])
            flat = lambda m, q: m.reshape(q.shape[0], -1, *m.shape[-2:])
            looks = lambda q, k, v, m: (
                attend(q, flat(k, q), flat(v, q), m) if m.shape[-1] else jnp.zeros_like(q)
            )
            h = join([looks(*part) for part in zip(queries, keys, values, masks, strict=True)])
            y = save_for_backward(
                residual(
                    y
                    + reduce_scatter(
                        gated_linear(h, self.out[...], jnp.tanh(self.attention_gate[...]), 2)
                    )
                )
            )
        return residual(
            y
            + reduce_scatter(
                self.feed_forward(all_gather(self.dense_norm(y)), jnp.tanh(self.dense_gate[...]))
            )
        )
