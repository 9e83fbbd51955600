"""A visitor's prompt as it is put together: shots, then texts, images and clips in order."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flamingo_jax.errors import UserError
from flamingo_jax.inference.attention_maps import AttentionMaps
from flamingo_jax.processing.visuals import Visual

MOST_PARTS = 64
"""Limit on the parts of a prompt besides its shots, and on the shots."""
MOST_CHARACTERS = 100_000
"""Limit on the characters of one text; how many tokens fit is the model's to say."""

Part = str | Visual


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """An example to ask about, or to show as a shot.

    parts: texts and visuals, without the answer.
    answer: what follows, with its leading space; "" where it is not known.
    """

    parts: tuple[Part, ...]
    answer: str = ""

    @property
    def shot(self) -> list[Part]:
        """Returns the parts with the answer at their end."""
        parts = list(self.parts)
        if parts and isinstance(parts[-1], str):
            parts[-1] += self.answer
        elif self.answer:
            parts.append(self.answer)
        return parts


@dataclasses.dataclass
class Session:
    """What one visitor has put together, and the answer to it.

    shots: indices of examples that are shown before the prompt.
    parts: the prompt's texts and visuals in order.
    asked: the index of the example that is asked about, -1 for none.
    version: counts changes, so that the page can tell a new prompt from the same one.
    running, stopped: whether an answer is being written, and whether it is to stop.
    stream: of that answer.
    maps, token, block: of the last answer, and which token and block are looked at.
    """

    shots: list[int] = dataclasses.field(default_factory=list)
    parts: list[Part] = dataclasses.field(default_factory=lambda: [""])
    asked: int = -1
    version: int = 0
    running: bool = False
    stopped: bool = False
    stream: Any = None
    maps: AttentionMaps | None = None
    token: int = 0
    block: int | None = None

    def write(self, texts: Mapping[int, str]) -> None:
        """Stores the texts as typed, by their index among the parts.

        Raises: UserError for a text that is too long.
        """
        for index, text in texts.items():
            if len(text) > MOST_CHARACTERS:
                raise UserError(
                    f"a text has {len(text):,} characters, but {MOST_CHARACTERS:,} are the most:"
                    " shorten it"
                )
            if 0 <= index < len(self.parts) and isinstance(self.parts[index], str):
                self.parts[index] = text

    def add(self, *parts: Part) -> None:
        """Adds parts at the prompt's end; a visual goes before an empty last text.

        Raises: UserError where there would be too many.
        """
        if len(self.parts) + len(parts) > MOST_PARTS:
            raise UserError(
                f"a prompt has at most {MOST_PARTS} texts, images and clips: remove some first"
            )
        end = len(self.parts)
        if self.parts[-1:] == [""] and all(isinstance(part, Visual) for part in parts):
            end -= 1
        self.parts[end:end] = parts

    def move(self, index: int, by: int) -> None:
        """Moves a part up (-1) or down (1)."""
        if 0 <= index < len(self.parts) and 0 <= index + by < len(self.parts):
            parts = self.parts
            parts[index], parts[index + by] = parts[index + by], parts[index]

    def remove(self, index: int) -> None:
        """Removes a part."""
        if 0 <= index < len(self.parts):
            del self.parts[index]

    def clear(self) -> None:
        """Empties the prompt and its shots."""
        self.parts, self.shots, self.asked = [""], [], -1

    def ask(self, index: int, examples: Sequence[Example]) -> None:
        """Makes an example the prompt, after the shots."""
        self.parts, self.asked = list(examples[index].parts), index
        self.shots = [shot for shot in self.shots if shot != index]

    def show(self, index: int) -> None:
        """Adds an example to the shots, or removes it.

        Raises: UserError where there would be too many.
        """
        if index in self.shots:
            self.shots.remove(index)
        elif len(self.shots) == MOST_PARTS:
            raise UserError(f"a prompt has at most {MOST_PARTS} shots: remove some first")
        else:
            self.shots.append(index)

    def prompt(self, examples: Sequence[Example]) -> list[Part]:
        """Returns the whole prompt, shots first, without empty texts.

        Raises: UserError where nothing is in it.
        """
        shown = [part for index in self.shots for part in examples[index].shot]
        prompt = [part for part in [*shown, *self.parts] if not isinstance(part, str) or part]
        if not prompt:
            raise UserError("the prompt is empty: write a text, or add an image or a clip")
        return prompt
