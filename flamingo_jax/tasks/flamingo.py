"""Likelihood of text given the visuals interleaved with it (paper equation 1), for one dataset's batch."""

import jax
import jax.numpy as jnp

from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.tasks.task import Batch, Loss, split_rows, token_loss

VISUAL_ARRAYS = ("images", "features", "frame_mask", "visuals")


class FlamingoTask:
    """Batches: tokens, positions, segments, media_index int32 [B, L], loss_mask bool [B, L], visuals int32 [B, N], frame_mask bool [M, T]
    and images uint8 [M, T, H, W, 3] with M = B * N, row b owning the places b * N + n, or in their place the frozen encoder's `features` [M, T, S, C]."""

    def __init__(self, reduction: str = "sequence_sum", use_visuals: bool = True):
        self.reduction = reduction
        self.use_visuals = use_visuals

    def loss(self, model: Flamingo, batch: Batch, key: jax.Array | None) -> Loss:
        visual_tokens = visuals = None
        if self.use_visuals and "visuals" in batch:
            features = batch["features"] if "features" in batch else model.encode_images(batch["images"])
            visual_tokens, visuals = model.resample(features.astype(model.dtype), batch["frame_mask"]), batch["visuals"]
        logits = model(
            batch["tokens"], batch["positions"], batch["segments"], batch["media_index"], visual_tokens, visuals, rows_own_visuals=True
        )
        return token_loss(logits, batch, self.reduction)

    def microbatches(self, batch: Batch, count: int) -> Batch:
        """Rows and their visuals stay together; `visuals` counts from the start of its own part."""
        parts = split_rows(batch, count)
        if "visuals" in parts:
            start = jnp.arange(count) * parts["frame_mask"].shape[1]
            parts["visuals"] = jnp.where(parts["visuals"] >= 0, parts["visuals"] - start[:, None, None], -1)
        return parts

    def without_pictures(self, batch: Batch) -> Batch:
        return {name: a for name, a in batch.items() if name not in VISUAL_ARRAYS}

    def watch(self, trainable: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """tanh of the gates, by block (paper figure 6)."""
        gates = {"attention": "attention_gate", "dense": "dense_gate"}
        return {f"gates/{name}": jnp.tanh(trainable[f"gated_xattn/layers/{gate}"]) for name, gate in gates.items()}
