"""Continuous batching: many prompts through a few rows. A row whose answer has ended is given
to the next prompt, so that a short answer does not wait for the long ones beside it.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flamingo_jax.inference.answer_text import AnswerText
from flamingo_jax.inference.decoding import NO_TOKEN
from flamingo_jax.inference.prompts import TokenisedPrompt
from flamingo_jax.inference.rows import Chunk, RowOptions, Rows

CHUNK = 8
"""Tokens that are decoded between two looks at which rows have ended."""
WIDTH = 64
"""The largest chunk, for when nothing waits for a row."""


class StreamedToken(NamedTuple):
    """A token of an answer as it comes.

    text: what it adds to the text; "" while a character, or what may be a stop string, is not
      complete.
    token: its id; the last one may be that of <EOC> or <EOS>, which have no text.
    log_probability: of the token, by the model's own distribution.
    """

    text: str
    token: int
    log_probability: float


@dataclasses.dataclass(eq=False)
class Answer:
    """A prompt and its answer so far.

    key: uint32, the data of its PRNG key for sampling.
    stop_tokens: the ids that end it.
    emit: gets every token as it comes, as `StreamedToken`; None where only the whole answer is
      wanted.
    finished: whether it ended by itself. cancelled: set by anyone to end it.
    """

    prompt: TokenisedPrompt
    text: AnswerText
    key: np.ndarray
    max_tokens: int
    temperature: float
    top_p: float
    stop_tokens: tuple[int, ...]
    emit: Callable[[Any], None] | None = None
    score: float = 0.0
    finished: bool = False
    cancelled: bool = False

    def take(self, token: int, log_probability: float, last: bool) -> bool:
        """Adds a token, the last one or not, and returns whether the answer ends with it."""
        self.score += log_probability
        piece = ""
        if token in self.stop_tokens:
            self.finished = True
        else:
            piece = self.text.add(token)
            self.finished = self.text.stopped
        ends = self.finished or last
        if self.emit is not None:
            piece += self.text.finish() if ends else ""
            self.emit(StreamedToken(piece, token, log_probability))
        return ends


class RowPrograms(Protocol):
    """The compiled programs of `inference.rows` for a model: see there."""

    def start_rows(
        self, prompts: Sequence[TokenisedPrompt], options: RowOptions, *, slots: int, size: int
    ) -> Rows:
        """Reads as many prompts as the options have rows; missing ones repeat the first."""

    def insert_rows(self, rows: Rows, new: Rows, places: np.ndarray) -> Rows: ...

    def empty_rows(self, like: Rows, count: int, size: int) -> Rows: ...

    def advance_rows(self, rows: Rows, cancelled: np.ndarray, steps: int) -> tuple[Rows, Chunk]:
        """The chunk is on the host."""


class RowPool:
    """A fixed number of rows and the answers that they write.

    Args:
      size: slots for the tokens of a prompt and its answer.
      slots: the most visuals of a prompt.
    """

    def __init__(self, programs: RowPrograms, count: int, *, size: int, slots: int):
        self.programs, self.size, self.slots = programs, size, slots
        self.answers: list[Answer | None] = [None] * count
        self._rows: Rows | None = None
        # Rows that the host has freed and the device still decodes.
        self._closing: set[int] = set()

    @property
    def free(self) -> list[int]:
        """Returns the rows that write no answer."""
        return [row for row, answer in enumerate(self.answers) if answer is None]

    @property
    def busy(self) -> bool:
        """Returns whether any row writes an answer."""
        return any(self.answers)

    def admit(self, answers: Sequence[Answer], batch: int) -> None:
        """Reads the prompts of at most `batch` answers, as a batch of that size, into free
        rows.
        """
        given = [*answers, *[answers[0]] * (batch - len(answers))]
        fields: list[Any] = [
            np.stack([answer.key for answer in given]),
            np.array([answer.max_tokens for answer in given], np.int32),
            np.array([answer.temperature for answer in given], np.float32),
            np.array([answer.top_p for answer in given], np.float32),
        ]
        options = RowOptions(*fields)
        new = self.programs.start_rows(
            [answer.prompt for answer in answers], options, slots=self.slots, size=self.size
        )
        chosen = self.free[: len(answers)]
        # Rows past the answers repeat the first: their place is none.
        places = np.full(batch, len(self.answers), np.int32)
        places[: len(chosen)] = chosen
        if self._rows is None and batch == len(self.answers):
            closed = range(len(answers), batch)
            self._rows, self._closing = new, set(closed)
        else:
            if self._rows is None:
                self._rows = self.programs.empty_rows(new, len(self.answers), self.size)
            self._rows = self.programs.insert_rows(self._rows, new, places)
        self._closing -= set(chosen)
        for row, answer in zip(chosen, answers, strict=True):
            self.answers[row] = answer

    def advance(self, steps: int) -> list[Answer]:
        """Decodes the next tokens of every row, and returns the answers that have ended."""
        ended = [answer for row in range(len(self.answers)) if (answer := self._drop(row))]
        if not self.busy:
            return ended
        assert self._rows is not None
        cancelled = np.zeros(len(self.answers), bool)
        cancelled[list(self._closing)] = True
        self._closing.clear()
        self._rows, chunk = self.programs.advance_rows(self._rows, cancelled, steps)
        for row, answer in enumerate(self.answers):
            if answer is not None and self._take(row, answer, chunk):
                self.answers[row] = None
                ended.append(answer)
        return ended

    def grow(self, count: int) -> None:
        """Adds rows, up to `count` in all."""
        if self._rows is not None:
            places = np.arange(len(self.answers), dtype=np.int32)
            larger = self.programs.empty_rows(self._rows, count, self.size)
            self._rows = self.programs.insert_rows(larger, self._rows, places)
        self.answers += [None] * (count - len(self.answers))

    def _drop(self, row: int) -> Answer | None:
        """Frees a row whose answer was cancelled, and returns that."""
        answer = self.answers[row]
        if answer is None or not answer.cancelled:
            return None
        self.answers[row] = None
        self._closing.add(row)
        return answer

    def _take(self, row: int, answer: Answer, chunk: Chunk) -> bool:
        """Gives an answer its tokens of a chunk, and returns whether it ends."""
        tokens = chunk.tokens[row].tolist()
        count = tokens.index(NO_TOKEN) if NO_TOKEN in tokens else len(tokens)
        closes = not bool(chunk.open[row])
        for place in range(count):
            last = closes and place == count - 1
            if answer.take(tokens[place], float(chunk.log_probabilities[row, place]), last):
                if not closes:
                    self._closing.add(row)
                return True
        return False


def complete(
    programs: RowPrograms, answers: Sequence[Answer], *, rows: int, batch: int, slots: int
) -> Iterator[Answer]:
    """Writes all answers, with `rows` rows at a time, and yields each as it ends.

    batch: how many prompts are read at a time, at most `rows`.
    """
    longest = max(a.prompt.padded_length + a.max_tokens for a in answers)
    pool = RowPool(programs, rows, size=longest, slots=slots)
    waiting = collections.deque(answers)
    watched = any(answer.text.watches for answer in answers)
    while waiting or pool.busy:
        while waiting and len(pool.free) >= min(batch, len(waiting)):
            group = [waiting.popleft() for _ in range(min(batch, len(waiting)))]
            pool.admit(group, batch)
        yield from pool.advance(CHUNK if waiting or watched else WIDTH)
