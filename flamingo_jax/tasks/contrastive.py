"""Which caption belongs to which picture, and the other way round (paper B.1.3, equations 4 and 5)."""

import jax
import jax.numpy as jnp

from flamingo_jax.experiment import ContrastiveConfig
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.tasks.task import Batch, Loss

Array = jax.Array


def contrastive_loss(images: Array, texts: Array, scale: Array, label_smoothing: float, same: Array | None = None) -> tuple[Array, Array]:
    """Softmax cross-entropy over the batch, picture to text plus text to picture.

    Args:
      images, texts: float32 [B, J] of length 1, row by row a pair. scale: the inverse temperature.
      label_smoothing: the share of each target that is spread over the batch.
      same: bool [B, B], True where two pairs have the same caption and so share the target; by default only a pair itself.

    Returns: the loss and the share of pictures whose own caption (or one equal to it) scores highest.
    """
    batch = images.shape[0]
    logits = scale * images @ texts.T
    same = jnp.eye(batch, dtype=bool) if same is None else same
    target = same / same.sum(1, keepdims=True)
    target = target * (1 - label_smoothing) + label_smoothing / batch
    loss = -(target * jax.nn.log_softmax(logits, axis=1)).sum(1).mean() - (target * jax.nn.log_softmax(logits.T, axis=1)).sum(1).mean()
    return loss, same[jnp.arange(batch), logits.argmax(1)].mean()


class ContrastiveTask:
    """Batches: images uint8 [B, H, W, 3], tokens int32 [B, L], mask bool [B, L]; every row is every other's negative."""

    def __init__(self, config: ContrastiveConfig):
        self.config = config

    def loss(self, model: DualEncoder, batch: Batch, key: Array | None) -> Loss:
        tokens, mask = batch["tokens"], batch["mask"]
        images = model.encode_images(batch["images"], train=key is not None, key=key)
        texts = model.encode_texts(tokens, mask)
        same = None
        if self.config.merge_duplicates:
            rows = jnp.where(mask, tokens, -1)
            same = (rows[:, None] == rows[None]).all(-1)
        scale = jnp.exp(model.log_inverse_temperature[...].astype(jnp.float32))
        loss, accuracy = contrastive_loss(images, texts, scale, self.config.label_smoothing, same)
        one = jnp.float32(1)
        return Loss(loss, one, {"accuracy": (accuracy, one), "inverse_temperature": (scale, one)})

    def microbatches(self, batch: Batch, count: int) -> Batch:
        raise NotImplementedError("the contrastive loss is no sum over microbatches")

    def without_pictures(self, batch: Batch) -> None:
        return None

    def watch(self, trainable: dict[str, Array]) -> dict[str, Array]:
        return {}
