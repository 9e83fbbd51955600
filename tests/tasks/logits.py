"""The token loss of logits that are given."""

import jax

from flamingo_jax.tasks.task import Batch, Loss
from flamingo_jax.tasks.token_loss import token_losses

Array = jax.Array


class Given:
    """A model whose last hidden states are its logits."""

    remat = "none"

    def logit_parts(self, x: Array) -> tuple[Array, ...]:
        return (x,)


def token_loss(logits: Array, batch: Batch, reduction: str) -> Loss:
    """The loss of one dataset's rows, logits [B, L, V]."""
    return token_losses(Given(), logits, {"": batch}, reduction)[""]
