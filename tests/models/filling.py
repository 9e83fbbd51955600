"""Models for tests, their parameters drawn by numpy: none is where it starts (a bias of 0 hides
its absence), and nothing is compiled.
"""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flamingo_jax.experiment import ContrastiveConfig
from flamingo_jax.models import nfnet
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.pytrees import from_flat, to_flat

M = TypeVar("M", bound=nnx.Module)

ONE_STAGE = nfnet.Variant((4,), (4,), (8,), (2,), (1,), 1024, 8)
"""The least NFNet with a stack: two blocks after one convolution."""


def filled(make: Callable[[nnx.Rngs], M], seed: int = 0) -> M:
    """The module that `make` builds; its gains and scales are near 1, the rest is normal with
    deviation 0.3.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def middle(name: str) -> float:
        return float(name.endswith(("gain", "scale")))

    values = {
        name: jnp.asarray(middle(name) + 0.3 * rng.standard_normal(s.shape), jnp.float32)
        for name, s in to_flat(state).items()
    }
    nnx.replace_by_pure_dict(state, from_flat(values))
    return nnx.merge(graph, state)


def filled_dual_encoder(config: ContrastiveConfig, dtype: jnp.dtype = jnp.float32) -> DualEncoder:
    """A dual encoder whose `vision.variant` may be "one_stage", the ONE_STAGE above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nfnet.VARIANTS, "one_stage", ONE_STAGE)
        return filled(lambda rngs: DualEncoder(config, rngs=rngs, dtype=dtype))
