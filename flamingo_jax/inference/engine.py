"""The inference engine: runs a Flamingo on lists of prompts, for texts, log-likelihoods,
logits or image features.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flamingo_jax.errors import UserError
from flamingo_jax.inference import programs
from flamingo_jax.inference.candidates import CandidateTree, make_trees
from flamingo_jax.inference.generator import Generator, ProgressCallback
from flamingo_jax.inference.prompts import (
    Prompt,
    PromptBatch,
    bucket_length,
    collate,
    tokenise,
    visual_slots,
)
from flamingo_jax.inference.scoring import tree_arrays
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.pytrees import to_flat

Array = jax.Array
LOGITS_IN_BATCH = 1 << 26
"""Limit on the logits of candidates that are computed at a time."""


class Engine(Generator):
    """Runs a model on lists of prompts: generates texts, scores candidates, and computes logits
    and features; see `DeviceModel` for where it runs and for the arguments.
    """

    def log_likelihoods(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[str]],
        *,
        close: bool = True,
        progress: ProgressCallback | None = None,
    ) -> list[np.ndarray]:
        """Computes the log-probability of each candidate as the continuation of its prompt.

        Args:
          candidates: for each prompt the texts, including a leading space where there is one.
          close: also score the <EOC> after a candidate, so that a candidate which is the
            beginning of another one is not favoured.

        Returns: for each prompt float64 [number of its candidates].

        Raises: UserError where prompts and lists of candidates differ in number, or a
          candidate has no tokens.
        """
        if len(prompts) != len(candidates):
            raise UserError(
                f"there are {len(prompts)} prompts and {len(candidates)} lists of candidates: "
                "give each prompt a list of its own"
            )
        trees = make_trees(candidates, functools.partial(self._candidate_ids, close=close))
        found = {n: np.zeros(0) for n, tree in enumerate(trees) if not tree.parts}
        asked = [n for n in range(len(prompts)) if n not in found]
        longest = max((tree.longest for tree in trees), default=0)
        columns = self.config.language_model.vocab_size + self.config.extra_tokens
        size = max((len(part.tokens) for tree in trees for part in tree.parts), default=1)
        rows = max(1, LOGITS_IN_BATCH // (columns * size))
        for part, batch in self._batches([prompts[n] for n in asked], longest, rows):
            indices = [asked[place] for place in part]
            scores = self._score_batch(batch, [trees[n] for n in indices], longest)
            found |= dict(zip(indices, scores, strict=True))
            if progress is not None:
                progress(len(indices))
        return [found[prompt] for prompt in range(len(prompts))]

    def _candidate_ids(self, text: str, close: bool) -> list[int]:
        """Encodes a candidate; `close` adds <EOC>. Raises UserError where it has no tokens."""
        ids = self.tokenizer.encode(text) + [self.tokenizer.eoc] * close
        if not ids:
            raise UserError(f"the candidate {text!r} has no tokens: leave it out")
        return ids

    def _score_batch(
        self, batch: PromptBatch, trees: list[CandidateTree], longest: int
    ) -> list[np.ndarray]:
        """Scores the candidates of each prompt of a batch, of at most `longest` ids."""
        prompts, media = self._to_device(batch)
        # Rounded up to a multiple of 4, for few compiled shapes.
        size = prompts.slots + -(-longest // 4) * 4
        prefilled = self._compute(programs.prefill_prompts, prompts, media, size)
        # One part after the other, for memory.
        parts = [
            self.run(programs.score_tree, prefilled, media, self._placement.by_row(part))
            for part in tree_arrays(trees, len(batch.lengths))
        ]
        return [tree.scores(each) for tree, each in zip(trees, np.stack(parts, 1), strict=False)]

    def logits(self, prompts: Sequence[Prompt]) -> Array:
        """Computes the next-token logits at every token of the prompts.

        Returns: float32 [B, L, V + extra], where L is the length of the longest prompt and
          [b, t] are the logits of the token after the t-th of prompt b; 0 past a prompt's end.
        """
        tokenised = [tokenise(prompt, self.tokenizer) for prompt in prompts]
        self.check(tokenised, 0)
        longest = max(len(prompt.tokens) for prompt in tokenised)
        batch = collate(
            tokenised,
            rows=self._rows(len(prompts)),
            length=bucket_length(longest),
            slots=visual_slots(max(len(prompt.visuals) for prompt in tokenised)),
            pad_token=self.tokenizer.pad,
        )
        arrays, media = self._to_device(batch)
        if self._placement.mesh is None:
            logits = programs.prompt_logits(self._graph, self._state, arrays, media)
        else:
            # Through the host, so that callers get an array of one device, as without a mesh.
            logits = jnp.asarray(self.run(programs.prompt_logits, arrays, media))
        return logits[: len(prompts), :longest]

    @functools.cached_property
    def encoder_digest(self) -> str:
        """Identifies the vision encoder by its parameters, config and compute dtype: equal
        digests are equal `features`, up to the rounding of devices.
        """
        told = json.dumps([dataclasses.asdict(self.config.vision), str(self.dtype)], default=str)
        content = hashlib.blake2b(told.encode(), digest_size=16)
        for name, value in sorted(to_flat(self._state).items()):
            if name.startswith("vision_encoder/"):
                array = np.asarray(jax.device_get(value))
                content.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
        return content.hexdigest()

    def features(self, visuals: Sequence[Visual]) -> np.ndarray:
        """Computes the vision encoder's features of visuals, for RICES: float32 [M, C] of
        length 1. Features of earlier calls are cached.
        """
        if not visuals:
            return np.zeros((0, 0), np.float32)
        self._check_size(visuals)
        different = {visual.digest: visual for visual in visuals}
        rows = self._cached_features.get(
            list(different),
            lambda missing: dict(
                self.encode_visuals(
                    [different[digest] for digest in missing], programs.mean_features
                )
            ),
        )
        features = np.stack([rows[visual.digest] for visual in visuals])
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
