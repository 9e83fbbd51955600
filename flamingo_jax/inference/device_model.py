"""A model on its devices, and what turns prompts into its batches.

Prompts are sorted into padded batches of few shapes, since each shape is compiled, and every
distinct visual is encoded once.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference import programs
from flamingo_jax.inference.array_cache import ArrayCache
from flamingo_jax.inference.decoding import TokenConstraints
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.inference.placement import Placement
from flamingo_jax.inference.prefill import PromptArrays
from flamingo_jax.inference.prompts import (
    Prompt,
    PromptBatch,
    TokenisedPrompt,
    after_prefix,
    bucket_length,
    collate,
    common_prefix,
    next_power,
    tokenise,
    visual_slots,
)
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.visuals import Visual

TOKENS_IN_BATCH = 16_384
VISUALS_IN_BATCH = 512
"""Limits on the tokens and visuals of a batch, padding included, for memory."""
LEAST_PREFIX = 32
"""The fewest tokens that all prompts must begin with to have them read apart."""
FRAMES_IN_BATCH = 64
"""Frames that the vision encoder takes at a time."""
CACHED_BYTES = 512 << 20
"""Size of the host cache of visual tokens, and of that of features, for repeated visuals."""


class DeviceModel:
    """Runs a model on batches of prompts, on the device or the mesh that its parameters are on.
    Results do not depend on which prompts share a batch, up to float32 rounding, nor on the
    mesh.

    On a mesh batches have a multiple of its row shards (data * fsdp) rows, and their limits are
    those of each shard. Where several processes share the mesh, each makes the same calls and
    gets the same results.

    Args:
      with_visuals: False removes every image, as in training without images; the image tags
        stay in the text.
      batch_size: the largest number of prompts in a batch.
    """

    def __init__(self, loaded: LoadedFlamingo, *, with_visuals: bool = True, batch_size: int = 64):
        self.tokenizer, self.config = loaded.tokenizer, loaded.config
        self.with_visuals = with_visuals
        self._graph, self._state = nnx.split(loaded.model)
        self.dtype = loaded.model.dtype
        self._placement = Placement.of(self._state)
        self.batch_size = batch_size
        self._constraints = token_constraints(loaded.tokenizer, loaded.config.extra_tokens)
        self._cached_tokens = ArrayCache(CACHED_BYTES)
        self._cached_features = ArrayCache(CACHED_BYTES)

    @property
    def vocabulary(self) -> int:
        """Returns the number of token ids, with <EOC> and other added ones."""
        return self.config.language_model.vocab_size + self.config.extra_tokens

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Returns the token ids that are never generated."""
        return self._constraints.suppressed

    def _check_size(self, visuals: Iterable[Visual]) -> None:
        """Raises UserError for a visual that does not have the model's image size."""
        size = self.config.vision.image_size
        for visual in visuals:
            height, width = visual.frames.shape[1:3]
            if (height, width) != (size, size):
                raise UserError(
                    f"a visual is {width} x {height} pixels, but the model takes {size} x"
                    f" {size}: give it as flamingo_jax.Image or Video, which resize it"
                )

    def check(self, prompts: Sequence[TokenisedPrompt], further: int) -> None:
        """Raises UserError for a prompt that, with `further` more tokens, is longer than the
        model allows, or that has too many visuals.
        """
        self._check_size(visual for prompt in prompts for visual in prompt.visuals)
        most = most_tokens(self.config)
        for prompt in prompts:
            if len(prompt.tokens) + further > most:
                raise UserError(
                    f"a prompt has {len(prompt.tokens)} tokens, and {further} are to follow, but"
                    f" {most} are the most in all: shorten it, or give fewer shots"
                )
            if len(prompt.visuals) > VISUALS_IN_BATCH:
                raise UserError(
                    f"a prompt has {len(prompt.visuals)} images and videos, but"
                    f" {VISUALS_IN_BATCH} are the most: give fewer shots"
                )

    def _batches(
        self, prompts: Sequence[Prompt], further: int, most_rows: int = TOKENS_IN_BATCH
    ) -> Iterator[tuple[list[int], PromptBatch]]:
        """Batches prompts of similar length, at most `most_rows` of them, each with room for
        `further` more tokens: yields (indices of the prompts in the list, batch).
        """
        if not prompts:
            return
        tokenised = [tokenise(prompt, self.tokenizer) for prompt in prompts]
        self.check(tokenised, further)
        tokenised = self._read_prefix(tokenised)
        slots = visual_slots(max(len(p.visuals) for p in tokenised))
        rows = self._batch_rows(tokenised, slots, most_rows)
        # By length, so that a batch has little padding.
        order = sorted(range(len(prompts)), key=lambda prompt: len(tokenised[prompt].tokens))
        chosen = [order[start : start + rows] for start in range(0, len(order), rows)]
        for part in chosen:
            members = [tokenised[prompt] for prompt in part]
            length = bucket_length(max(len(prompt.tokens) for prompt in members))
            yield (
                part,
                collate(
                    members, rows=rows, length=length, slots=slots, pad_token=self.tokenizer.pad
                ),
            )

    def _read_prefix(self, prompts: list[TokenisedPrompt]) -> list[TokenisedPrompt]:
        """Reads what all prompts begin with, such as the same shots, once; returns the rest of
        each. Prompts with little in common stay whole.
        """
        count = common_prefix(prompts) if len(prompts) > 1 else 0
        if count < LEAST_PREFIX:
            return prompts
        first = prompts[0]
        index = first.media_index[:count]
        seen = first.visuals[: int(index.max()) + 1]
        batch = collate(
            [TokenisedPrompt(first.tokens[:count], index, seen)],
            rows=self._rows(1),
            length=bucket_length(count),
            slots=visual_slots(len(seen)),
            pad_token=self.tokenizer.pad,
        )
        prefix = self._compute(programs.read_prompts_prefix, *self._to_device(batch))
        attend = self.config.conditioning.attend_to_media
        return [after_prefix(prompt, count, prefix, attend_to_media=attend) for prompt in prompts]

    def _batch_rows(
        self, prompts: Sequence[TokenisedPrompt], slots: int, most: int = TOKENS_IN_BATCH
    ) -> int:
        """Returns how many rows of a batch, at most `most`, prompts with `slots` slots for
        visuals get.
        """
        longest = max(prompt.padded_length for prompt in prompts)
        in_memory = min(most, TOKENS_IN_BATCH // longest, VISUALS_IN_BATCH // max(slots, 1))
        rows = min(self.batch_size, in_memory * self._placement.row_shards)
        # Rounded down to a power of 2, and no more than the prompts need.
        return self._rows(min(max(next_power(2, rows + 1) // 2, 1), next_power(2, len(prompts))))

    def _rows(self, count: int) -> int:
        """Returns the rows of a batch for `count` prompts: a power of 2 for few compiled shapes,
        and a multiple of the mesh's row shards.
        """
        shards = self._placement.row_shards
        return -(-next_power(2, count) // shards) * shards

    def _compute(self, program: Any, *arguments: Any) -> Any:
        """Runs a compiled program of the model; its results stay on the devices."""
        with self._placement.active():
            return program(self._graph, self._state, *arguments)

    def run(self, program: Any, *arguments: Any) -> Any:
        """Runs a compiled program of the model, and brings its results to the host."""
        return self._placement.fetch(self._compute(program, *arguments))

    def _to_device(self, batch: PromptBatch) -> tuple[PromptArrays, Any]:
        """Moves a batch to the devices, with the cross-attention keys and values of its
        visuals.
        """
        put = self._placement.by_row
        tokens, index, lengths = put((batch.tokens, batch.media_index, batch.lengths))
        if not batch.distinct:
            return PromptArrays(tokens, index, lengths, None, batch.prefix), None
        # Visuals that prompts share are projected once; few sizes, each of which is compiled.
        size = min(next_power(4, len(batch.distinct)), batch.visuals.size)
        if self.with_visuals:
            prompts = PromptArrays(tokens, index, lengths, put(batch.visuals), batch.prefix)
            return prompts, self._prepare_media(batch.distinct, size)
        # Without visuals no token attends to any, which adds exactly zero. Shapes stay the
        # same, so that engines with and without visuals share compiled programs.
        blank = np.zeros(
            (
                size,
                self.config.resampler.latents,
                self.config.language_model.width,
            ),
            np.float32,
        )
        none = put((np.full_like(batch.media_index, -1), np.full_like(batch.visuals, -1)))
        prompts = PromptArrays(tokens, none[0], lengths, none[1], batch.prefix)
        return prompts, self._prepared(blank.astype(self.dtype))

    def _prepare_media(self, distinct: list[Visual], size: int) -> Any:
        """Encodes visuals, from the cache where possible, and projects them to every
        cross-attention block's keys and values; padded with blanks to `size` visuals.
        """
        tokens = self.visual_tokens(distinct)
        blank = np.zeros((size - len(tokens), *tokens.shape[1:]), tokens.dtype)
        return self._prepared(np.concatenate([tokens, blank]))

    def visual_tokens(self, visuals: Sequence[Visual]) -> np.ndarray:
        """Encodes visuals, from the cache where possible, to their visual tokens [M, R, D].

        Raises: UserError where these are not finite.
        """
        by_digest = {visual.digest: visual for visual in visuals}
        found = self._cached_tokens.get(
            list(by_digest),
            lambda missing: dict(
                self.encode_visuals(
                    [by_digest[digest] for digest in missing], programs.encode_visuals
                )
            ),
        )
        return np.stack([found[visual.digest] for visual in visuals])

    def _prepared(self, visual_tokens: np.ndarray) -> Any:
        """Computes the keys and values of visual tokens [M, R, D], which every row may attend
        to: whole on every row shard.
        """
        return self._compute(programs.prepare_media, self._placement.whole(visual_tokens))

    def encode_visuals(
        self, visuals: list[Visual], encode: Any
    ) -> Iterator[tuple[bytes, np.ndarray]]:
        """Encodes visuals by `encode`, and yields (digest, array) of each. Only visuals with
        equal numbers of frames share a batch, so that images are not padded to clips.

        Raises: UserError where the result is not finite.
        """
        groups: dict[int, list[Visual]] = {}
        for visual in visuals:
            groups.setdefault(self._padded_frames(len(visual.frames)), []).append(visual)
        for frames, group in sorted(groups.items()):
            devices = self._placement.devices
            most = max(1, FRAMES_IN_BATCH // frames) * devices
            for start in range(0, len(group), most):
                part = group[start : start + most]
                # Full batches, or one small batch of 1, 8 or 64 rows: few compiled shapes.
                rows = most if len(group) > most else min(next_power(8, len(part)), most)
                rows = -(-rows // devices) * devices
                images = np.zeros((rows, frames, *part[0].frames.shape[1:]), np.uint8)
                mask = np.zeros((rows, frames), bool)
                for row, visual in enumerate(part):
                    images[row, : len(visual.frames)], mask[row, : len(visual.frames)] = (
                        visual.frames,
                        True,
                    )
                on_devices = self._placement.over_devices((images, mask))
                encoded = np.asarray(self.run(encode, *on_devices))
                if not np.isfinite(encoded[: len(part)].astype(np.float32)).all():
                    raise UserError(
                        "the model's features of an image are not finite: its weights are"
                        " damaged, or too large for its compute type; export it again, or load"
                        " it with float32"
                    )
                yield from zip((visual.digest for visual in part), encoded, strict=False)

    def _padded_frames(self, frames: int) -> int:
        """Returns how many frames a visual is padded to: clips up to the trained length to
        that length. Longer ones are not padded, which would change the interpolation of their
        time embeddings.
        """
        trained = self.config.resampler.frames
        return frames if frames == 1 or frames > trained else trained


def token_constraints(tokenizer: Tokenizer, extra_tokens: int = 1) -> TokenConstraints:
    """Returns the ids that end a text, <EOC> and <EOS>, and those that are never generated:
    the ones that are no targets in training, such as <BOS>, padding and unused ids.
    """
    stop = (tokenizer.eoc, tokenizer.eos)
    suppressed = {
        tokenizer.bos,
        tokenizer.pad,
        *range(tokenizer.pieces, tokenizer.eoc),
        *range(tokenizer.eoc + 1, tokenizer.vocab_size + extra_tokens),
    }
    if len(tokenizer.image_tag_ids) == 1:
        suppressed.add(tokenizer.image_tag_ids[0])
    return TokenConstraints(stop, tuple(sorted(suppressed - set(stop))))


def most_tokens(config: FlamingoConfig) -> int:
    """Returns how many tokens a prompt and its answer may have in all."""
    positions = config.language_model.positions
    learned = positions.max_length if positions.kind == "learned" else TOKENS_IN_BATCH
    return min(learned, TOKENS_IN_BATCH)
