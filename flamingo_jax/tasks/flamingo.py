"""The Flamingo stage's task: the likelihood of text given the visuals interleaved with it
(paper equation 1).
"""

import jax
import jax.numpy as jnp

from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.packing import PackedText
from flamingo_jax.partitioning.constraints import constrain, row_shards
from flamingo_jax.partitioning.mesh import BY_VISUAL, ROWS
from flamingo_jax.processing.jitter import jittered
from flamingo_jax.tasks.task import Batch, Loss, split_rows
from flamingo_jax.tasks.token_loss import loss_weight, token_losses

VISUAL_ARRAYS = (*BY_VISUAL, "visuals")


def drop_blanks(batch: Batch) -> Batch:
    """Drops the blank visuals that pad a batch's list for the mesh's `model` axis
    (`partitioning.host_shard`): afterwards M = B * N, in the order of rows. Without blanks the
    images keep their sharding.
    """
    rows, places = batch["visuals"].shape
    groups = row_shards() if rows % row_shards() == 0 else 1

    def real(a: jax.Array) -> jax.Array:
        if a.shape[0] == rows * places:
            return a
        # All-gathered over `model` first: the compiler would otherwise send the slice of a
        # sharded axis in many small pieces. Each shard's blanks are at its end.
        return (
            constrain(a, ROWS)
            .reshape(groups, -1, *a.shape[1:])[:, : rows // groups * places]
            .reshape(-1, *a.shape[1:])
        )

    listed = {name: real(batch[name]) for name in BY_VISUAL if name in batch}
    return batch | listed | {"frame_mask": constrain(listed["frame_mask"], ROWS)}


def mask_unreadable(batch: Batch) -> Batch:
    """Masks visuals that could not be decoded (those in `visuals` without any real frame), and
    every segment with a token that attends to such a visual: it gets no loss and no visual.

    This happens here, on the device, and not where rows are packed: processes that read the
    same rows decode different visuals of them, and do not know of each other's failures.
    """
    visuals, segments, index = batch["visuals"], batch["segments"], batch["media_index"]
    # [B, N] visuals that failed -> [B, L] tokens that attend to one -> [B, L] their segments.
    failed = (visuals >= 0) & ~batch["frame_mask"].reshape(*visuals.shape, -1).any(-1)
    looks = ((index[:, :, None] == jnp.arange(visuals.shape[1])) & failed[:, None]).any(-1)
    lost = ((segments[:, :, None] == segments[:, None]) & looks[:, None]).any(-1)
    masked = {
        "loss_mask": batch["loss_mask"] & ~lost,
        "media_index": jnp.where(lost, -1, index),
        "visuals": jnp.where(failed, -1, visuals),
    }
    return batch | masked


def masked_batch(batch: Batch) -> Batch:
    """Prepares a batch for the model: `drop_blanks`, then `mask_unreadable`. Idempotent;
    text-only batches stay as they are.
    """
    return mask_unreadable(drop_blanks(batch)) if "frame_mask" in batch else batch


def jittered_images(batch: Batch) -> jax.Array:
    """Jitters the colours of a batch's images, where it has a `jitter` array."""
    return jittered(batch["images"], batch["jitter"]) if "jitter" in batch else batch["images"]


@jax.jit
def text_only(batch: Batch) -> Batch:
    """Removes every visual from a batch, after `masked_batch`, so that both score the same
    tokens.
    """
    return {name: a for name, a in masked_batch(batch).items() if name not in VISUAL_ARRAYS}


def _visual_tokens(model: Flamingo, batches: list[Batch]) -> jax.Array | None:
    """Encodes and resamples all datasets' visuals, in one batch -> visual tokens [S, V, R, D]
    as `Flamingo.hidden_states` takes them; None without visuals.
    """
    if not batches:
        return None
    if all("features" in batch for batch in batches):
        features = [batch["features"] for batch in batches]
    else:
        features = model.encode_images([jittered_images(batch) for batch in batches])
    return model.resample(features, [batch["frame_mask"] for batch in batches])


class FlamingoTask:
    """Next-token prediction on text interleaved with visuals.

    A batch holds
      tokens, positions, segments, media_index: int32 [B, L], see `PackedText`;
      loss_mask: bool [B, L], True where a token is a target;
      visuals: int32 [B, N], indices into M, -1 for none;
      frame_mask: bool [M, T], True for real frames;
      images: uint8 [M, T, H, W, 3], or a frozen encoder's `features` [M, T, cells, C];
      jitter: float32 [M, T, 6], the parameters of colour jitter (`processing.jitter`), optional.

    M = B * N, where row b's visual n is number b * N + n; or more, with blanks that pad each
    row shard's part to a multiple of the mesh's `model` axis. Text-only batches have the first
    four and loss_mask.

    Args:
      reduction: see `token_losses`.
      use_visuals: False trains on the text alone.
    """

    packs = True

    def __init__(self, reduction: str = "sequence_sum", use_visuals: bool = True):
        self.reduction = reduction
        self.use_visuals = use_visuals

    def losses(
        self, model: Flamingo, batches: dict[str, Batch], key: jax.Array | None
    ) -> dict[str, Loss]:
        """Computes each dataset's loss. All are packed into one stream, and all visuals
        encoded as one batch.
        """
        batches = {name: masked_batch(batch) for name, batch in batches.items()}
        seen = {
            name: batch
            for name, batch in batches.items()
            if self.use_visuals and "visuals" in batch
        }
        texts = [
            PackedText(
                batch["tokens"],
                batch["positions"],
                batch["segments"],
                batch["media_index"],
                batch["visuals"] if name in seen else None,
            )
            for name, batch in batches.items()
        ]
        x, broken = model.hidden_states(texts, _visual_tokens(model, list(seen.values())))
        return token_losses(model, x, batches, self.reduction, broken)

    def weight(self, batch: Batch) -> jax.Array:
        return loss_weight(masked_batch(batch), self.reduction)

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """Splits rows together with their visuals, and renumbers `visuals` within each part."""
        batch, rows = masked_batch(batch), batch["tokens"].shape[0]
        # [B * N, ...] -> [B, N, ...], so that rows and visuals are split alike.
        by_row = {
            name: constrain(a, ROWS).reshape(rows, -1, *a.shape[1:]) if name in BY_VISUAL else a
            for name, a in batch.items()
        }
        parts = {
            name: a.reshape(count, -1, *a.shape[3:]) if name in BY_VISUAL else a
            for name, a in split_rows(by_row, count).items()
        }
        if "visuals" in parts:
            own = jnp.arange(parts["visuals"][0].size).reshape(parts["visuals"].shape[1:])
            parts["visuals"] = jnp.where(parts["visuals"] >= 0, own, -1)
        return parts

    def without_images(self, batch: Batch) -> Batch:
        return text_only(batch)

    def watch(self, trainable: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns tanh of every block's gates, [blocks] each (paper figure 6)."""
        gates = {
            "attention": "gated_xattn/layers/attention_gate",
            "dense": "gated_xattn/layers/dense_gate",
            "grafted": "grafted/layers/gate",
        }
        return {
            f"gates/{name}": jnp.tanh(trainable[gate])
            for name, gate in gates.items()
            if gate in trainable
        }
