"""Likelihood of text given the visuals interleaved with it (paper equation 1), for one
dataset's batch.
"""

import jax
import jax.numpy as jnp

from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.packing import PackedText, join, shapes_of, split
from flamingo_jax.partitioning.constraints import constrain, row_shards
from flamingo_jax.partitioning.mesh import BY_VISUAL, ROWS
from flamingo_jax.processing.jitter import jittered
from flamingo_jax.tasks.task import (
    Batch,
    Loss,
    loss_weight,
    split_rows,
    summed_loss,
    target_mask,
    token_loss,
)

VISUAL_ARRAYS = (*BY_VISUAL, "visuals")


def in_rows(batch: Batch) -> Batch:
    """The batch without the blanks that fill its list of visuals up for the mesh's `model` axis
    (`partitioning.share`): M = B * N, in the order of rows. Images that need none stay where
    they lie.
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


def without_failed(batch: Batch) -> Batch:
    """Masks what could not be read: a visual in `visuals` without one frame, and every segment
    of which a token looks at such a visual.

    Such a segment has nothing to learn and nothing to see. It is told here and not where rows
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


def readable(batch: Batch) -> Batch:
    """The batch as the model reads it; a batch of texts, and one that this was done to, is left
    as it is.
    """
    return without_failed(in_rows(batch)) if "frame_mask" in batch else batch


def with_colours(batch: Batch) -> jax.Array:
    """The images of a batch, their colours jittered where it says how."""
    return jittered(batch["images"], batch["jitter"]) if "jitter" in batch else batch["images"]


@jax.jit
def text_alone(batch: Batch) -> Batch:
    """The text of a readable batch."""
    return {name: a for name, a in readable(batch).items() if name not in VISUAL_ARRAYS}


class FlamingoTask:
    """Batches: tokens, positions, segments, media_index int32 [B, L], loss_mask bool [B, L],
    visuals int32 [B, N], frame_mask bool [M, T] and images uint8 [M, T, H, W, 3], or in their
    place the frozen encoder's `features` [M, T, S, C]. M = B * N, row b owning the places b * N
    + n, or as much more as fills up each row shard's part for the mesh's `model` axis. Where
    the colours of images are to be jittered, jitter float32 [M, T, 6] says how
    (`processing.jitter`).
    """

    def __init__(self, reduction: str = "sequence_sum", use_visuals: bool = True):
        self.reduction = reduction
        self.use_visuals = use_visuals

    def loss(self, model: Flamingo, batch: Batch, key: jax.Array | None) -> Loss:
        batch = readable(batch)
        visual_tokens = visuals = None
        if self.use_visuals and "visuals" in batch:
            features = (
                batch["features"]
                if "features" in batch
                else model.encode_images(with_colours(batch))
            )
            visual_tokens, visuals = (
                model.resample(features.astype(model.dtype), batch["frame_mask"]),
                batch["visuals"],
            )
        logits = model(
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            batch["media_index"],
            visual_tokens,
            visuals,
            rows_own_visuals=True,
        )
        return token_loss(logits, batch, self.reduction)

    def weight(self, batch: Batch) -> jax.Array:
        return loss_weight(target_mask(readable(batch)), batch["segments"], self.reduction)

    def stream_losses(
        self, model: Flamingo, batches: dict[str, Batch], key: jax.Array | None
    ) -> dict[str, Loss]:
        """Text of all datasets as one stream of tokens, images as one batch of the encoder."""
        batches = {name: readable(batch) for name, batch in batches.items()}
        seen = {
            name: batch
            for name, batch in batches.items()
            if self.use_visuals and "visuals" in batch
        }
        visual_tokens = None
        if seen:
            given = all("features" in batch for batch in seen.values())
            features = (
                [batch["features"] for batch in seen.values()]
                if given
                else model.encode_stream([with_colours(batch) for batch in seen.values()])
            )
            visual_tokens = model.resample_stream(
                features, [batch["frame_mask"] for batch in seen.values()]
            )
        rows = [
            PackedText(
                batch["tokens"],
                batch["positions"],
                batch["segments"],
                batch["media_index"],
                batch["visuals"] if name in seen else None,
            )
            for name, batch in batches.items()
        ]
        # One target more than there are: rows of a stream have whole lengths, and what the last
        # token is followed by counts nothing.
        one_more = ((0, 0), (0, 1))
        targets = [jnp.pad(batch["tokens"][:, 1:], one_more) for batch in batches.values()]
        masks = [target_mask(batch) for batch in batches.values()]
        x, broken = model.hidden_states(rows, visual_tokens)
        counts = join([jnp.pad(mask, one_more) for mask in masks])
        losses, correct = model.target_losses(x, join(targets), counts)
        losses = jnp.where(broken, jnp.nan, losses)
        parts = zip(*(split(a, shapes_of(targets)) for a in (losses, correct)), strict=True)
        return {
            name: summed_loss(loss[:, :-1], right[:, :-1], mask, batch["segments"], self.reduction)
            for (name, batch), mask, (loss, right) in zip(
                batches.items(), masks, parts, strict=True
            )
        }

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """Rows and their visuals stay together; `visuals` counts from the start of its own
        part.
        """
        batch, rows = readable(batch), batch["tokens"].shape[0]
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
        return text_alone(batch)

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
