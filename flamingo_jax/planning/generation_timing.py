"""Times generation and the ranking of candidates on this machine, each beside plain code that
recomputes what inference keeps.
"""

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flamingo_jax.experiment import FlamingoConfig
from flamingo_jax.inference.device_model import token_constraints
from flamingo_jax.inference.model import Model
from flamingo_jax.inference.prompts import Prompt, TokenisedPrompt
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.processing.tokenizer import Tokenizer
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.pytrees import from_flat, to_flat

Array = jax.Array

SHOTS = 4
BEAMS = 3
"""The paper's beam size of open-ended tasks."""
CAPTION_TOKENS = 12
"""Tokens of the text after each image of a prompt."""


class GenerationWork(NamedTuple):
    """How much is timed.

    max_tokens: generated for each prompt. names: candidates that are ranked. sample: of them are
    scored one at a time. batches: prompts that are generated at a time. runs: of each, of which
    the median counts.
    """

    max_tokens: int = 20
    names: int = 1000
    sample: int = 20
    batches: tuple[int, ...] = (1, 64)
    runs: int = 3


class CaptionTiming(NamedTuple):
    """Seconds of one caption after 4 shots by beam search with 3 beams.

    plain: by a loop that runs the whole model on whole rows for each token; plain_text: by the
    same loop with the visuals encoded once. prompt, tokens: of the prompt, and generated.
    agrees: whether both ways give the same text.
    """

    seconds: float
    plain: float
    plain_text: float
    prompt: int
    tokens: int
    agrees: bool

    @property
    def ratio(self) -> float:
        """How many times as long the plain loop takes."""
        return self.plain / self.seconds


class RankingTiming(NamedTuple):
    """Seconds of ranking names after 4 shots.

    one_at_a_time: of scoring each name by a call of its own, which reads the whole prompt, scaled
    from `sample` names to all. name_tokens: of all names, with <EOC>. difference: the largest
    between a name's two scores.
    """

    seconds: float
    one_at_a_time: float
    names: int
    sample: int
    name_tokens: int
    difference: float

    @property
    def ratio(self) -> float:
        """How many times as long one name at a time takes."""
        return self.one_at_a_time / self.seconds


class GenerationRates(NamedTuple):
    """What some number of prompts of 4 shots at a time take.

    prefill, decode: tokens a second of greedy decoding with encoded visuals: of the prompts, up
    to the first new token, and new ones after it.
    caption: seconds of captioning all prompts by beam search with 3 beams, visuals included.
    """

    prefill: float
    decode: float
    caption: float


class GenerationTiming(NamedTuple):
    """Holds the timings; seconds are medians. rates: {prompts at a time: what they take}."""

    captioning: CaptionTiming
    ranking: RankingTiming
    rates: dict[int, GenerationRates]


class NumberTokenizer(Tokenizer):
    """A tokenizer for models of random weights: the text of token 17 is " w17". Any other
    character becomes padding.
    """

    def __init__(self, vocab_size: int):
        self.pieces = self.vocab_size = vocab_size
        self.bos, self.eos, self.pad, self._tag = range(4)

    def files(self) -> dict[str, bytes]:
        return {}

    def encode(self, text: str) -> list[int]:
        words = re.findall(r" w(\d+)|(\S)", text.replace(self.image_tag, f" w{self._tag}"))
        return [int(number) if number else self.pad for number, _ in words]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" w{number}" for number in ids if self._tag < number < self.pieces)


def random_model(config: FlamingoConfig, seed: int = 0) -> Model:
    """Makes a Flamingo of random weights with open gates, and a tokenizer of its size; in float32
    on CPUs, elsewhere in bfloat16.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: Flamingo(config, rngs=nnx.Rngs(0), dtype=dtype))
    )
    rng = np.random.default_rng(seed)

    # Drawn by numpy: compiling the model's own initialisation takes longer than the benchmark.
    def draw(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith(("scale", "gain", "gate")):
            return jnp.ones(shape, dtype)
        return jnp.asarray(0.02 * rng.standard_normal(shape, np.float32), dtype)

    state = {name: draw(name, like.shape) for name, like in to_flat(shapes).items()}
    model = nnx.merge(graph, nnx.State(from_flat(state)))
    return Model(model, NumberTokenizer(config.language_model.vocab_size))


def time_generation(model: Model, work: GenerationWork = GenerationWork()) -> GenerationTiming:
    """Times captioning, ranking, and prefill and decoding by number of prompts.

    Prompts are 4 shots and a query, of random images and texts.
    """
    prompts = PromptMaker(model)
    return GenerationTiming(
        _time_captioning(model, prompts, work),
        _time_ranking(model, prompts, work),
        {count: time_rates(model, prompts, count, work) for count in work.batches},
    )


class PromptMaker:
    """Draws random prompts for a model: images of its size, and texts of its own tokens."""

    def __init__(self, model: Model, seed: int = 0):
        self._rng = np.random.default_rng(seed)
        self._tokenizer, self._size = model.tokenizer, model.config.vision.image_size
        never = {model.tokenizer.eos, *token_constraints(model.tokenizer).suppressed}
        self._ids = [n for n in range(model.tokenizer.pieces) if n not in never]

    def prompt(self) -> list[Any]:
        """Draws 4 images with a text after each, an image, and the beginning of its text."""
        parts: list[Any] = []
        for _ in range(SHOTS):
            parts += [self._image(), self._text(CAPTION_TOKENS)]
        return [*parts, self._image(), self._text(1)]

    def names(self, count: int) -> list[str]:
        """Draws distinct texts of 1 to 4 tokens, as names of classes have."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self._text(int(self._rng.integers(1, 5)))] = None
        return list(found)

    def _image(self) -> Visual:
        shape = (1, self._size, self._size, 3)
        return Visual(self._rng.integers(0, 256, shape, dtype=np.uint8))

    def _text(self, tokens: int) -> str:
        while True:
            ids = [int(number) for number in self._rng.choice(self._ids, tokens)]
            text = " " + self._tokenizer.decode(ids).strip()
            if self._tokenizer.image_tag not in text and text.strip():
                return text


def _time_captioning(model: Model, prompts: PromptMaker, work: GenerationWork) -> CaptionTiming:
    def caption(prompt: Prompt) -> Any:
        return model.generate(prompt, max_tokens=work.max_tokens, beam_size=BEAMS)

    plain = PlainCaptioner(model, work.max_tokens)
    # Each run has a prompt of its own: the engine keeps visuals that it has seen.
    asked = [prompts.prompt() for _ in range(work.runs + 1)]
    ours, seconds = _each(caption, asked)
    texts, plain_seconds = _each(plain.caption, asked)
    _, text_seconds = _each(lambda prompt: plain.caption(prompt, encode_once=True), asked)
    return CaptionTiming(
        seconds,
        plain_seconds,
        text_seconds,
        prompt=len(model.tokenise(asked[0])[0].tokens),
        tokens=len(ours[0].tokens),
        agrees=[one.text for one in ours] == texts,
    )


def _time_ranking(model: Model, prompts: PromptMaker, work: GenerationWork) -> RankingTiming:
    names = prompts.names(work.names)
    asked = [prompts.prompt() for _ in range(work.runs + 1)]
    found, seconds = _each(lambda prompt: model.score(prompt, names), asked)
    sample = names[:: max(1, len(names) // work.sample)][: work.sample]
    once, single = _each(
        lambda name: model.score(asked[0], [name]).log_likelihoods[0], [sample[0], *sample]
    )
    scores = dict(zip(names, found[0].log_likelihoods, strict=True))
    return RankingTiming(
        seconds,
        single * len(names),
        names=len(names),
        sample=len(sample),
        name_tokens=sum(len(model.tokenizer.encode(name)) + 1 for name in names),
        difference=max(abs(scores[name] - one) for name, one in zip(sample, once[1:], strict=True)),
    )


def time_rates(
    model: Model, prompts: PromptMaker, count: int, work: GenerationWork
) -> GenerationRates:
    """Times `count` prompts at a time: see `GenerationRates`."""
    # New images in each run, and the last ones again where encoding is not timed.
    asked = [[prompts.prompt() for _ in range(count)] for _ in range(work.runs + 1)]
    _, caption = _each(
        lambda some: model.generate(some, max_tokens=work.max_tokens, beam_size=BEAMS), asked
    )
    read = sum(len(one.tokens) for one in model.tokenise(asked[-1]))

    def write(tokens: int) -> tuple[int, float]:
        made, seconds = _each(
            lambda some: model.generate(some, max_tokens=tokens, beam_size=1),
            asked[-1:] * (work.runs + 1),
        )
        return sum(len(one.tokens) for one in made[-1]), seconds

    (_, first), (written, whole) = write(1), write(1 + work.max_tokens)
    decode = max(written - count, 0) / max(whole - first, 1e-9)
    return GenerationRates(read / first, decode, caption)


def _each(run: Callable[..., Any], given: Sequence[Any]) -> tuple[list[Any], float]:
    """Runs over what is given; returns the results, and the median seconds of all but the first,
    which compiles.
    """
    results, taken = [], []
    for one in given:
        began = time.perf_counter()
        results.append(run(one))
        taken.append(time.perf_counter() - began)
    return results, sorted(taken[1:])[(len(taken) - 1) // 2]


class PlainCaptioner:
    """Beam search as one would write it without a cache: every step runs the model on whole rows
    of the prompt and what follows, and chooses on the host.
    """

    def __init__(self, model: Model, max_tokens: int):
        self._model, self._max_tokens = model, max_tokens
        graph, self._state = nnx.split(model.flamingo)
        found = token_constraints(model.tokenizer, model.config.extra_tokens)
        self._stop, self._suppressed = list(found.stop), list(found.suppressed)

        def encode(state: Any, images: Array) -> Array:
            mask = jnp.ones(images.shape[:2], bool)
            return nnx.merge(graph, state).encode_visuals(images, mask)

        def read(
            state: Any, tokens: Array, segments: Array, index: Array, visuals: Array, last: Array
        ) -> Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            places = jnp.broadcast_to(jnp.arange(visuals.shape[0]), (len(tokens), len(visuals)))
            logits = nnx.merge(graph, state)(tokens, positions, segments, index, visuals, places)
            return jax.nn.log_softmax(logits[:, last])

        self._encode, self._read = jax.jit(encode), jax.jit(read)

    def caption(self, prompt: Prompt, *, encode_once: bool = False) -> str:
        """Returns the best text, up to its first stop token."""
        made = self._model.tokenise(list(prompt))[0]
        images = np.stack([visual.frames for visual in made.visuals])
        visuals = self._encode(self._state, images) if encode_once else None
        opened: list[tuple[float, list[int]]] = [(0.0, [])]
        best: tuple[float, list[int]] = (-np.inf, [])
        for _ in range(self._max_tokens):
            seen = self._encode(self._state, images) if visuals is None else visuals
            rows = self._next(made, [tokens for _, tokens in opened], seen)
            scores = np.array([score for score, _ in opened])[:, None] + rows
            order = np.argsort(-scores, axis=None)[: BEAMS * (1 + len(self._stop))]
            grown = [(float(scores.flat[n]), *divmod(int(n), rows.shape[1])) for n in order]
            for score, parent, token in grown[:BEAMS]:
                if token in self._stop and score > best[0]:
                    best = (score, opened[parent][1])
            opened = [
                (score, [*opened[parent][1], token])
                for score, parent, token in grown
                if token not in self._stop
            ][:BEAMS]
            if best[0] >= opened[0][0]:
                break
        return self._model.tokenizer.decode((best if np.isfinite(best[0]) else opened[0])[1])

    def _next(self, prompt: TokenisedPrompt, rows: list[list[int]], visuals: Array) -> np.ndarray:
        """Reads the prompt followed by each of the rows -> the next tokens' log-probabilities."""
        size = len(prompt.tokens)
        shape = (BEAMS, size + self._max_tokens)
        tokens, segments = np.zeros((2, *shape), np.int32)
        index = np.full(shape, prompt.media_index[-1], np.int32)
        tokens[:, :size], index[:, :size] = prompt.tokens, prompt.media_index
        end = size + len(rows[0])
        segments[:, :end] = 1
        for place, row in enumerate(rows):
            tokens[place, size:end] = row
        found = np.asarray(
            self._read(self._state, tokens, segments, index, visuals, np.int32(end - 1))
        )[: len(rows)].astype(np.float64)
        found[:, self._suppressed] = -np.inf
        return found
