"""The contrastive stage's task: match images to captions and captions to images over the whole
batch, as CLIP does (paper B.1.3, equations 4 and 5).
"""

import jax
import jax.numpy as jnp

from flamingo_jax.experiment import ContrastiveConfig
from flamingo_jax.models.dual_encoder import DualEncoder
from flamingo_jax.models.ops import MASKED
from flamingo_jax.processing.jitter import jittered
from flamingo_jax.tasks.task import Batch, Loss, split_rows

Array = jax.Array


def contrastive_loss(
    images: Array,
    texts: Array,
    scale: Array,
    label_smoothing: float,
    same: Array | None = None,
    real: Array | None = None,
) -> tuple[Array, Array]:
    """Computes softmax cross-entropy over the batch, image to text plus text to image.

    Args:
      images, texts: float32 [B, J] of length 1; row b of both is a pair.
      scale: scalar, the inverse temperature.
      label_smoothing: the share of each target that is spread evenly over the batch.
      same: bool [B, B], True where two pairs have equal captions, which are then both
        positives; by default only a pair itself.
      real: bool [B], False for padding rows, which have no loss and are no negatives. By
        default all rows are real.

    Returns: the loss, a mean over pairs, and the accuracy: the share of images whose own
      caption (or an equal one) scores highest.
    """
    batch = images.shape[0]
    same = jnp.eye(batch, dtype=bool) if same is None else same
    real = jnp.ones((batch,), bool) if real is None else real
    # Padding rows are zeroed before any product: NaN times a zero gradient would be NaN.
    images, texts = (jnp.where(real[:, None], a, 0.0) for a in (images, texts))
    # [B, B] in full float32: accelerators multiply with lower precision by default, and the
    # inverse temperature grows to 100.
    logits = scale * jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)
    both, count = real[:, None] & real[None], jnp.maximum(real.sum(), 1)
    logits, same = jnp.where(both, logits, MASKED), same & both
    target = same / jnp.maximum(same.sum(1, keepdims=True), 1)
    target = jnp.where(both, target * (1 - label_smoothing) + label_smoothing / count, 0.0)
    # `same` and so `target` are symmetric: one serves both directions.
    loss = (
        -(target * (jax.nn.log_softmax(logits, axis=1) + jax.nn.log_softmax(logits, axis=0))).sum()
        / count
    )
    return loss, same[jnp.arange(batch), logits.argmax(1)].sum() / count


def jittered_images(batch: Batch) -> Array:
    """Jitters the colours of the images [B, H, W, 3], where the batch has a `jitter` array."""
    if "jitter" not in batch:
        return batch["images"]
    return jittered(batch["images"][:, None], batch["jitter"][:, None])[:, 0]


class ContrastiveTask:
    """Contrastive training of image and text encoders; all other rows of a batch are
    negatives.

    A batch holds
      images: uint8 [B, H, W, 3];
      tokens: int32 [B, L];
      mask: bool [B, L], True for real tokens; a row without any is padding;
      jitter: float32 [B, 6], the parameters of colour jitter (`processing.jitter`), optional.

    Arrays [P, B / P, ...], as `microbatches` makes them, are encoded part by part and
    recomputed in the backward pass, so that a large batch fits in memory; the similarities are
    still over the whole batch.
    """

    packs = False
    """A batch of one dataset has thousands of pairs, enough for efficient products; two
    datasets at a time would only take twice the memory.
    """

    def __init__(self, config: ContrastiveConfig):
        self.config = config

    def losses(
        self, model: DualEncoder, batches: dict[str, Batch], key: Array | None
    ) -> dict[str, Loss]:
        return {
            name: self._compare(model, *self._encode(model, batch, key))
            for name, batch in batches.items()
        }

    def weight(self, batch: Batch) -> Array:
        return jnp.float32(1)

    def _compare(
        self, model: DualEncoder, images: Array, texts: Array, tokens: Array, mask: Array
    ) -> Loss:
        """Computes the loss of embeddings [B, J] with their texts' tokens and mask [B, L]."""
        same = None
        if self.config.merge_duplicates:
            rows = jnp.where(mask, tokens, -1)
            same = (rows[:, None] == rows[None]).all(-1)
        scale = jnp.exp(model.log_inverse_temperature[...].astype(jnp.float32))
        loss, accuracy = contrastive_loss(
            images, texts, scale, self.config.label_smoothing, same, mask.any(1)
        )
        one = jnp.float32(1)
        return Loss(loss, one, {"accuracy": (accuracy, one), "inverse_temperature": (scale, one)})

    def _encode(
        self, model: DualEncoder, batch: Batch, key: Array | None
    ) -> tuple[Array, Array, Array, Array]:
        """Encodes a batch, part by part if it has parts -> images and texts [B, J], and the
        tokens and mask [B, L] in the same order.
        """

        def encode(arrays: tuple[Batch, Array | None]) -> tuple[Array, Array]:
            part, key = arrays
            images = model.encode_images(jittered_images(part), train=key is not None, key=key)
            return images, model.encode_texts(part["tokens"], part["mask"])

        tokens, mask = batch["tokens"], batch["mask"]
        if tokens.ndim == 2:
            return *encode((batch, key)), tokens, mask
        keys = None if key is None else jax.random.split(key, tokens.shape[0])
        images, texts = jax.lax.map(jax.checkpoint(encode, prevent_cse=False), (batch, keys))
        # [P, B / P, ...] -> [B, ...], undoing the stride of split_rows.
        images, texts, tokens, mask = (
            a.swapaxes(0, 1).reshape(-1, a.shape[-1]) for a in (images, texts, tokens, mask)
        )
        return images, texts, tokens, mask

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """Makes one microbatch [1, count, B / count, ...], since the loss is no sum over rows:
        `losses` encodes it in `count` parts.
        """
        return {name: a[None] for name, a in split_rows(batch, count).items()}

    def without_images(self, batch: Batch) -> None:
        return None

    def watch(self, trainable: dict[str, Array]) -> dict[str, Array]:
        return {}
