"""Writes few-shot prompts in the paper's formats (paper B.1.5): `<image>Output: ...` and
`<image>Question: ... Answer: ...`.

Whitespace follows the training text: a prompt ends with its last word or colon, and the
prediction begins with a space.
"""

import dataclasses
import re
from collections.abc import Sequence

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.examples import BenchmarkExample, InterleavedPage
from flamingo_jax.evaluation.media import MediaRef
from flamingo_jax.experiment import CAPTION_PROMPT, QUESTION_PROMPT
from flamingo_jax.inference.prompts import END_OF_CHUNK, SpecialToken, escape_image_tags
from flamingo_jax.processing.sequences import fill_prompt

WrittenPart = str | SpecialToken | MediaRef
WrittenPrompt = list[WrittenPart]
"""A prompt whose images and clips are not read yet."""


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """The format of an example: a text before the answer, which follows after a space.

    text: has {question} in the place of the example's question.
    """

    text: str

    def opening(self, example: BenchmarkExample) -> str:
        """Writes the text before the answer."""
        return escape_image_tags(fill_prompt(self.text, example.question))

    def whole(self, example: BenchmarkExample) -> str:
        """Writes an example with its first answer, as a shot."""
        return f"{self.opening(example)} {escape_image_tags(example.answers[0])}"


def question_template(text: str) -> PromptTemplate:
    """Makes the format of `--question_prompt`; raises UserError where it asks nothing."""
    if "{question}" not in text:
        raise UserError(
            f"--question_prompt={text!r} has no {{question}} in it, so that nothing would"
            " be asked: write it in"
        )
    return PromptTemplate(text)


CAPTION = PromptTemplate(CAPTION_PROMPT)
QUESTION = PromptTemplate(QUESTION_PROMPT)
# What begins the next example where a model did not stop at the end of its answer.
KEYWORDS = re.compile(r"\s*(?:Question:|Answer:|Output:|<image>).*", re.DOTALL)


def few_shot(
    query: BenchmarkExample,
    shots: Sequence[BenchmarkExample],
    text_only: Sequence[BenchmarkExample],
    template: PromptTemplate,
) -> WrittenPrompt:
    """Writes a prompt: `text_only` examples without their images, `shots` with theirs, and the
    query up to its answer.

    The paper's zero-shot prompts of open-ended tasks have two text-only examples and no shots
    (paper 3.3: one hurts, more help little).
    """
    parts: WrittenPrompt = []
    for example in text_only:
        parts += [template.whole(example), END_OF_CHUNK]
    for shot in shots:
        parts += [shot.media, template.whole(shot)]
    opening = template.opening(query)
    return [*parts, query.media, *([opening] if opening else [])]


def concept_binding(
    page: InterleavedPage, shots: int, *, shot_images: bool = True
) -> WrittenPrompt:
    """Writes a prompt of fast concept binding: the `shots` images before the page's last one
    with their texts, then the last image with its text up to the word to predict.

    shot_images: False leaves the texts of the shots alone.
    """
    parts: WrittenPrompt = []
    last = len(page.media) - 1
    for place in range(last - shots, last):
        text = escape_image_tags(page.texts[place + 1])
        parts += [page.media[place], text] if shot_images else [text, END_OF_CHUNK]
    return [*parts, page.media[last], escape_image_tags(split_last_word(page.texts[-1])[0])]


def split_last_word(text: str) -> tuple[str, str]:
    """Splits off the last word: "This is a dax" -> ("This is a", "dax")."""
    opening, _, word = text.rstrip().rpartition(" ")
    return opening, word


def clean(text: str) -> str:
    """Strips a prediction and cuts it where a next example begins, since models sometimes go
    on after the answer instead of predicting <EOC> (paper v1).
    """
    return KEYWORDS.sub("", text, count=1).strip()
