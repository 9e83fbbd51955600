"""The decoder layer of a language model: an attention half and a feed-forward half.

Its config sets the norm, positions, biases, heads and the form of the residual sum; all
published families that can be loaded are settings of this one layer.
"""

import math
from collections.abc import Callable

import jax
from flax import nnx

from flamingo_jax.experiment import LanguageModelConfig
from flamingo_jax.models.attention import SelfAttention
from flamingo_jax.models.cache import Cache, Continuation
from flamingo_jax.models.layers import FeedForward, make_norm, save_for_backward
from flamingo_jax.models.packing import Packing
from flamingo_jax.partitioning.constraints import all_gather, reduce_scatter, residual

Array = jax.Array


class DecoderLayer(nnx.Module):
    """One layer of a decoder language model, by `config.residual`:

    sequential: x += Attention(Norm(x)); x += FeedForward(Norm(x)).
    parallel: x += Attention(Norm1(x)) + FeedForward(Norm2(x)), both of the layer's input.
    parallel_one_norm: the same with Norm1 for both.
    """

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        # Each of the 2 * layers residual branches starts scaled by 1 / sqrt(2 * layers), so
        # that the variance of their sum does not grow with depth (as in GPT-2).
        branch_scale = 1 / math.sqrt(2 * config.layers)
        one_norm = config.residual == "parallel_one_norm"
        self.residual = config.residual
        self.attention_norm = make_norm(config.norm, config.width)
        self.attention = SelfAttention(config, out_scale=branch_scale, rngs=rngs)
        self.feed_forward_norm = None if one_norm else make_norm(config.norm, config.width)
        self.feed_forward = FeedForward(
            config.width,
            config.feed_forward.width,
            config.feed_forward.activation,
            gated=config.feed_forward.gated,
            bias=config.feed_forward.bias,
            rngs=rngs,
        )
        self.feed_forward.down[...] *= branch_scale

    def __call__(
        self,
        x: Array,
        positions: Array,
        packing: Packing | Continuation,
        cache: Cache | None,
        between: Callable[[Array], Array] | None = None,
    ) -> tuple[Array, Cache | None]:
        """Runs the layer on a stream x [S, T, D] -> [S, T, D], and the cache with these
        tokens.

        Args:
          positions: int32 [S, T].
          packing: which tokens of the stream form a row; when decoding, how they continue the
            rows of the cache.
          cache: of decoding, in place of the packing (see SelfAttention).
          between: updates the residual stream [S, T, D] between the halves of a sequential
            layer: `vanilla_xattn` runs its cross-attention there.
        """
        attention, cache = self.attention_branch(x, positions, packing, cache)
        if self.residual != "sequential":
            assert between is None, "nothing stands between halves that read the same input"
            return self.add(x, attention + self.feed_forward_branch(x)), cache
        x = save_for_backward(self.add(x, attention))
        if between is not None:
            x = between(x)
        return self.add(x, self.feed_forward_branch(x)), cache

    def attention_branch(
        self,
        x: Array,
        positions: Array,
        packing: Packing | Continuation,
        cache: Cache | None,
    ) -> tuple[Array, Cache | None]:
        """Computes what the attention half adds to x [S, T, D]; arguments as for `__call__`."""
        h = all_gather(self.attention_norm(x))
        branch, cache = self.attention(h, positions, packing, cache)
        return reduce_scatter(branch), cache

    def feed_forward_branch(self, x: Array) -> Array:
        """Computes what the feed-forward half adds to x [S, T, D]."""
        norm = self.feed_forward_norm or self.attention_norm
        return reduce_scatter(self.feed_forward(all_gather(norm(x))))

    def add(self, x: Array, branch: Array) -> Array:
        """Adds a branch to the residual stream [S, T, D], sharded as `residual` says."""
        return residual(x + branch)
