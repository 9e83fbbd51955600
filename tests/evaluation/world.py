"""Examples of plain images and an engine that answers from a script."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flamingo_jax.evaluation.examples import BenchmarkExample, InterleavedPage
from flamingo_jax.evaluation.media import LoadedMedia
from flamingo_jax.inference.completion import Completion
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.processing.visuals import Visual
from tests.inference.tiny_models import make_tokenizer, tiny_config

TOKENIZER = make_tokenizer()


def visual(value: int, frames: int = 1) -> Visual:
    return Visual(np.full((frames, 8, 8, 3), value, np.uint8))


def example(
    number: int, answer: str = "a red circle", question: str = "", question_type: str = ""
) -> BenchmarkExample:
    return BenchmarkExample(
        f"e{number}", LoadedMedia(visual(number % 256)), (answer,), question, question_type
    )


def page(number: int, words: Sequence[str]) -> InterleavedPage:
    return InterleavedPage(
        f"p{number}",
        ("", *(f"This is a {word}" for word in words)),
        tuple(LoadedMedia(visual(n)) for n in range(len(words))),
    )


class ScriptedEngine:
    """`says` continues a prompt; `likes` scores a candidate. Keeps the prompts it was given."""

    def __init__(
        self,
        says: Callable[[Prompt], str] = lambda prompt: "",
        likes: Callable[[Prompt, str], float] = lambda prompt, text: 0.0,
    ):
        self.says, self.likes = says, likes
        self.prompts: list[Prompt] = []
        self.encoder_digest = "e" * 32
        self.config, self.batch_size = tiny_config(40), 4
        self.tokenizer = TOKENIZER

    def generate(
        self, prompts: Sequence[Prompt], decoding: Any, *, seed: int = 0, progress: Any = None
    ) -> list[Completion]:
        self.prompts += prompts
        return [Completion(self.says(prompt), -1.0, True) for prompt in prompts]

    def log_likelihoods(
        self,
        prompts: Sequence[Prompt],
        candidates: Sequence[Sequence[str]],
        *,
        progress: Any = None,
    ) -> list[np.ndarray]:
        self.prompts += prompts
        return [
            np.array([self.likes(prompt, text) for text in texts])
            for prompt, texts in zip(prompts, candidates, strict=True)
        ]

    def features(self, visuals: Sequence[Visual]) -> np.ndarray:
        angles = np.array([v.frames.mean() / 100 for v in visuals])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
