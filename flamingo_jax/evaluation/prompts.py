"""Few-shot prompts in the paper's formats (paper B.1.5): `<image>Output: ...`,
`<image>Question: ... Answer: ...`.

Whitespace is that of training text: a prompt ends with its last word or colon, and what is
predicted begins with a space.
"""

import dataclasses
import re
from collections.abc import Sequence

from flamingo_jax.evaluation.examples import BenchmarkExample, InterleavedPage
from flamingo_jax.experiment import CAPTION_PROMPT, QUESTION_PROMPT
from flamingo_jax.inference.prompts import END_OF_CHUNK, PromptPart, escape_image_tags
from flamingo_jax.processing.sequences import fill_prompt


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """How an example is written: the text up to the answer, which follows after a space.

    text: with {question} where the example's question goes.
    """

    text: str

    def opening(self, example: BenchmarkExample) -> str:
        """Writes what stands before the answer."""
        return escape_image_tags(fill_prompt(self.text, example.question))

    def whole(self, example: BenchmarkExample) -> str:
        """Writes an example with its first answer, as a shot."""
        return f"{self.opening(example)} {escape_image_tags(example.answers[0])}"


CAPTION = PromptTemplate(CAPTION_PROMPT)
QUESTION = PromptTemplate(QUESTION_PROMPT)
KEYWORDS = re.compile(r"\s*(?:Question:|Answer:|Output:|<image>).*", re.DOTALL)


def few_shot(
    query: BenchmarkExample,
    shots: Sequence[BenchmarkExample],
    text_only: Sequence[BenchmarkExample],
    template: PromptTemplate,
) -> list[PromptPart]:
    """Writes `text_only` examples without their images, then `shots` with theirs, then the
    query up to its answer.

    Zero-shot prompts of open-ended tasks have two text-only examples and no shots (paper 3.3:
    one is harmful, more help little).
    """
    parts: list[PromptPart] = []
    for example in text_only:
        parts += [template.whole(example), END_OF_CHUNK]
    for shot in shots:
        parts += [shot.visual, template.whole(shot)]
    opening = template.opening(query)
    return [*parts, query.visual, *([opening] if opening else [])]


def concept_binding(page: InterleavedPage, shots: int) -> list[PromptPart]:
    """Writes the last `shots` images before the page's last one with their texts, then the last
    one with its text up to the last word.
    """
    parts: list[PromptPart] = []
    for place in range(len(page.visuals) - 1 - shots, len(page.visuals)):
        parts += [page.visuals[place], escape_image_tags(page.texts[place + 1])]
    parts[-1] = escape_image_tags(split_last_word(page.texts[-1])[0])
    return parts


def split_last_word(text: str) -> tuple[str, str]:
    """Splits off the last word: "This is a dax" -> ("This is a", "dax")."""
    opening, _, word = text.rstrip().rpartition(" ")
    return opening, word


def clean(text: str) -> str:
    """Cuts a prediction where the next example's keywords begin, since <EOC> is sometimes
    missed (paper v1), and strips it.
    """
    return KEYWORDS.sub("", text, count=1).strip()
