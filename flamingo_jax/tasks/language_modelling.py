"""The language modelling stage's task: next-token prediction on text alone."""

import jax

from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.packing import PackedText
from flamingo_jax.tasks.task import Batch, Loss, split_rows
from flamingo_jax.tasks.token_loss import loss_weight, token_losses


class LanguageModellingTask:
    """Next-token prediction on packed text. A batch holds tokens, positions, segments int32
    [B, L] and loss_mask bool [B, L]; see `PackedText` and `token_losses`.
    """

    packs = True

    def __init__(self, reduction: str = "sequence_sum"):
        self.reduction = reduction

    def losses(
        self, model: LanguageModel, batches: dict[str, Batch], key: jax.Array | None
    ) -> dict[str, Loss]:
        texts = [
            PackedText(batch["tokens"], batch["positions"], batch["segments"])
            for batch in batches.values()
        ]
        return token_losses(model, model.hidden_states(texts), batches, self.reduction)

    def weight(self, batch: Batch) -> jax.Array:
        return loss_weight(batch, self.reduction)

    def microbatches(self, batch: Batch, count: int) -> Batch:
        return split_rows(batch, count)

    def without_images(self, batch: Batch) -> None:
        return None

    def watch(self, trainable: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {}
