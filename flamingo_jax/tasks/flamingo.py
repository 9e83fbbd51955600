"""The Flamingo stage: likelihood of text given the visuals interleaved with it (paper equation
1).
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
    """Drops the blanks that fill a batch's list of visuals up for the mesh's `model` axis
    (`partitioning.host_shard`): M = B * N, in the order of rows. Where there are none, images
    stay where they lie.
    """
    rows, places = batch["visuals"].shape
    groups = row_shards() if rows % row_shards() == 0 else 1

    def real(a: jax.Array) -> jax.Array:
        if a.shape[0] == rows * places:
            return a
        # Gathered over `model` first: the compiler would send a slice of it place by place.
        return (
            constrain(a, ROWS)
            .reshape(groups, -1, *a.shape[1:])[:, : rows // groups * places]
            .reshape(-1, *a.shape[1:])
        )

    listed = {name: real(batch[name]) for name in BY_VISUAL if name in batch}
    return batch | listed | {"frame_mask": constrain(listed["frame_mask"], ROWS)}


def mask_unreadable(batch: Batch) -> Batch:
    """Masks what could not be read: a visual in `visuals` without one frame, and every segment
    of which a token looks at such a visual.

    Such a segment has nothing to learn and nothing to see. It is masked here and not where rows
    are made, since processes that read the same rows decode different visuals of them, and know
    nothing of the others' failures.
    """
    visuals, segments, index = batch["visuals"], batch["segments"], batch["media_index"]
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
    """Makes a batch what the model reads: no blanks, and what could not be read masked. A batch
    of texts, and one that this was done to, is left as it is.
    """
    return mask_unreadable(drop_blanks(batch)) if "frame_mask" in batch else batch


def jittered_images(batch: Batch) -> jax.Array:
    """Jitters the colours of a batch's images, where it says how."""
    return jittered(batch["images"], batch["jitter"]) if "jitter" in batch else batch["images"]


@jax.jit
def text_only(batch: Batch) -> Batch:
    """Takes every visual away from a batch; the text that remains is that of `masked_batch`."""
    return {name: a for name, a in masked_batch(batch).items() if name not in VISUAL_ARRAYS}


def _visual_tokens(model: Flamingo, batches: list[Batch]) -> jax.Array | None:
    """Encodes all datasets' visuals, their images as one batch of the encoder -> visual tokens as
    `Flamingo.hidden_states` takes them; None without visuals.
    """
    if not batches:
        return None
    if all("features" in batch for batch in batches):
        features = [batch["features"] for batch in batches]
    else:
        features = model.encode_images([jittered_images(batch) for batch in batches])
    return model.resample(features, [batch["frame_mask"] for batch in batches])


class FlamingoTask:
    """Batches: tokens, positions, segments, media_index int32 [B, L], loss_mask bool [B, L],
    visuals int32 [B, N], frame_mask bool [M, T] and images uint8 [M, T, H, W, 3], or in their
    place the frozen encoder's `features` [M, T, S, C]. M = B * N, row b owning the places b * N
    + n, or as much more as fills up each row shard's part for the mesh's `model` axis. Where
    the colours of images are to be jittered, jitter float32 [M, T, 6] says how
    (`processing.jitter`).
    """

    packs = True

    def __init__(self, reduction: str = "sequence_sum", use_visuals: bool = True):
        self.reduction = reduction
        self.use_visuals = use_visuals

    def losses(
        self, model: Flamingo, batches: dict[str, Batch], key: jax.Array | None
    ) -> dict[str, Loss]:
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
        """Rows and their visuals stay together; `visuals` counts from the start of its own
        part.
        """
        batch, rows = masked_batch(batch), batch["tokens"].shape[0]
        # A row with its visuals is [N, ...] of what is [B * N, ...].
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
        """tanh of the gates, by block (paper figure 6)."""
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
