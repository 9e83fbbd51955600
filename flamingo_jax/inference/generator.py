"""Generates the continuations of prompts: of lists of them by continuous batching or by beam
search, and of single ones as streams.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.inference import programs
from flamingo_jax.inference.answer_text import AnswerText
from flamingo_jax.inference.beam_search import Generated, beam_search
from flamingo_jax.inference.completion import Completion
from flamingo_jax.inference.decoding import NO_TOKEN, DecodingConfig, TokenConstraints
from flamingo_jax.inference.device_model import DeviceModel
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.inference.prefill import PromptArrays
from flamingo_jax.inference.prompts import (
    Prompt,
    TokenisedPrompt,
    bucket_length,
    collate,
    tokenise,
    visual_slots,
)
from flamingo_jax.inference.rows import Chunk, RowOptions, Rows
from flamingo_jax.inference.scheduler import WIDTH, Answer, complete
from flamingo_jax.inference.streaming import StreamScheduler, TextStream

Array = jax.Array
ProgressCallback = Callable[[int], None]
"""Called with the number of prompts finished since the last call."""


@functools.partial(jax.jit, static_argnames=("graph", "decoding", "constraints"))
def _beam_search(
    graph: Any,
    state: nnx.State,
    prompts: PromptArrays,
    media: Any,
    decoding: DecodingConfig,
    constraints: TokenConstraints,
) -> Generated:
    return beam_search(nnx.merge(graph, state), prompts, media, decoding, constraints)


class Generator(DeviceModel):
    """A model that continues prompts; see `DeviceModel` for the arguments."""

    def __init__(self, loaded: LoadedFlamingo, *, with_visuals: bool = True, batch_size: int = 64):
        super().__init__(loaded, with_visuals=with_visuals, batch_size=batch_size)
        self._streams = StreamScheduler(self, self._completion)

    def generate(
        self,
        prompts: Sequence[Prompt],
        decoding: DecodingConfig,
        *,
        seed: int = 0,
        progress: ProgressCallback | None = None,
    ) -> list[Completion]:
        """Generates a continuation of every prompt, up to its first <EOC>.

        seed: of sampling.
        """
        found: dict[int, Completion] = {}
        ways = self._beams if decoding.beam_size > 1 else self._continued
        for prompt, completion in ways(prompts, decoding, seed):
            found[prompt] = completion
            if progress is not None:
                progress(1)
        return [found[prompt] for prompt in range(len(prompts))]

    def stream(self, prompt: Prompt, decoding: DecodingConfig, *, seed: int = 0) -> TextStream:
        """Generates the continuation of a prompt token by token, the same as `generate`'s for
        this prompt alone. May be called from several threads at once.

        Raises: UserError where several processes share the mesh, since a stream is of one.
        """
        if self._placement.mesh is not None and self._placement.mesh.is_multi_process:
            raise UserError(
                "a stream runs in one process, but several share this model's mesh: use generate"
            )
        tokenised = tokenise(prompt, self.tokenizer)
        self.check([tokenised], decoding.max_tokens)
        if self.with_visuals and tokenised.visuals:
            # Here, so that a mistake is reported to the caller.
            self.visual_tokens(tokenised.visuals)
        key = np.asarray(programs.sampling_keys(np.uint32(seed), np.zeros(1, np.uint32)))[0]
        return self._streams.submit(self._answer(tokenised, decoding, key))

    def _beams(
        self, prompts: Sequence[Prompt], decoding: DecodingConfig, seed: int
    ) -> Iterator[tuple[int, Completion]]:
        """Generates by beam search, batch after batch: yields (index of the prompt, its
        completion).
        """
        for indices, batch in self._batches(prompts, decoding.max_tokens):
            prepared, media = self._to_device(batch)
            made = self.run(_beam_search, prepared, media, decoding, self._constraints)
            for row, prompt in enumerate(indices):
                found = [
                    self._cut(tokens[tokens != NO_TOKEN].tolist(), score, finished, decoding.stop)
                    for tokens, score, finished in zip(*(a[row] for a in made), strict=True)
                    if score > -np.inf
                ]
                yield prompt, dataclasses.replace(found[0], alternatives=tuple(found[1:]))

    def _cut(self, ids: list[int], score: Any, finished: Any, stop: Sequence[str]) -> Completion:
        """Returns the completion of a hypothesis, cut at its first stop string."""
        text = AnswerText(self.tokenizer, stop)
        for number in ids:
            text.add(number)
            if text.stopped:
                break
        return Completion(text.text, float(score), bool(finished) or text.stopped, text.tokens)

    def _continued(
        self, prompts: Sequence[Prompt], decoding: DecodingConfig, seed: int
    ) -> Iterator[tuple[int, Completion]]:
        """Generates greedily or by sampling, with continuous batching: yields (index of the
        prompt, its completion) as answers end.
        """
        tokenised = [tokenise(prompt, self.tokenizer) for prompt in prompts]
        if not tokenised:
            return
        self.check(tokenised, decoding.max_tokens)
        tokenised = self._read_prefix(tokenised)
        # Keys by the prompt's index in the list, so that sampling does not depend on how
        # prompts are batched.
        numbers = np.arange(len(prompts), dtype=np.uint32)
        keys = np.asarray(programs.sampling_keys(np.uint32(seed), numbers))
        answers = [
            self._answer(prompt, decoding, key) for prompt, key in zip(tokenised, keys, strict=True)
        ]
        number = {id(answer): place for place, answer in enumerate(answers)}
        # By length, so that prompts that are read together have little padding.
        answers.sort(key=lambda answer: len(answer.prompt.tokens))
        slots = visual_slots(max(len(prompt.visuals) for prompt in tokenised))
        rows = self._batch_rows(tokenised, slots)
        batch = rows if len(answers) <= rows else self._rows(max(rows // 4, 1))
        for answer in complete(self, answers, rows=rows, batch=batch, slots=slots):
            yield number[id(answer)], self._completion(answer)

    def _answer(self, prompt: TokenisedPrompt, decoding: DecodingConfig, key: np.ndarray) -> Answer:
        """Returns the empty answer to a prompt, for greedy decoding or sampling."""
        return Answer(
            prompt,
            AnswerText(self.tokenizer, decoding.stop),
            key,
            decoding.max_tokens,
            decoding.temperature,
            decoding.top_p,
            self._constraints.stop,
        )

    def _completion(self, answer: Answer) -> Completion:
        """Returns the result of an answer that has ended."""
        return Completion(answer.text.text, answer.score, answer.finished, answer.text.tokens)

    def start_rows(
        self, prompts: Sequence[TokenisedPrompt], options: RowOptions, *, slots: int, size: int
    ) -> Rows:
        """Reads prompts into new rows: see `scheduler.RowPrograms`."""
        batch = collate(
            prompts,
            rows=len(options.budget),
            length=bucket_length(max(len(prompt.tokens) for prompt in prompts)),
            slots=slots,
            pad_token=self.tokenizer.pad,
        )
        arrays, media = self._to_device(batch)
        return self._compute(
            programs.start_rows, arrays, media, self._placement.by_row(options), size
        )

    def insert_rows(self, rows: Rows, new: Rows, places: np.ndarray) -> Rows:
        """Replaces rows: see `scheduler.RowPrograms`."""
        return self._compute(programs.insert_rows, rows, new, self._placement.whole(places))

    def empty_rows(self, like: Rows, count: int, size: int) -> Rows:
        """Makes closed rows: see `scheduler.RowPrograms`."""
        return self._compute(programs.empty_rows, like, count, size)

    def advance_rows(self, rows: Rows, cancelled: np.ndarray, steps: int) -> tuple[Rows, Chunk]:
        """Decodes the next tokens: see `scheduler.RowPrograms`."""
        rows, chunk = self._compute(
            programs.advance_rows,
            rows,
            self._placement.by_row(cancelled),
            np.int32(steps),
            self._constraints,
            WIDTH,
        )
        return rows, self._placement.fetch(chunk)
