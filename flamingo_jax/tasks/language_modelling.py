"""Next-token prediction on text alone: the stage that makes the language model."""

import jax

from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.tasks.task import Batch, Loss, split_rows, token_loss


class LanguageModellingTask:
    """Batches hold tokens, positions, segments int32 [B, L] and loss_mask bool [B, L]."""

    def __init__(self, reduction: str = "sequence_sum"):
        self.reduction = reduction

    def loss(self, model: LanguageModel, batch: Batch, key: jax.Array | None) -> Loss:
        return token_loss(
            model(batch["tokens"], batch["positions"], batch["segments"]), batch, self.reduction
        )

    def microbatches(self, batch: Batch, count: int) -> Batch:
        return split_rows(batch, count)

    def without_images(self, batch: Batch) -> None:
        return None

    def watch(self, trainable: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {}
