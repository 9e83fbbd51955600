"""What the page does, without the page: prompts are edited, answered and looked at."""

import dataclasses
import math
import pathlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from flamingo_jax.errors import UserError
from flamingo_jax.inference.attention_maps import AttentionMaps
from flamingo_jax.inference.model import PAPER_BEAM_SIZE, Model
from flamingo_jax.models.conditioning import count_blocks
from flamingo_jax.playground import fragments
from flamingo_jax.playground.session import MOST_PARTS, Example, Session
from flamingo_jax.playground.uploads import UploadLimits, read_upload

GREEDY, SAMPLING, BEAM = "likeliest token", "sampling", f"beam search of {PAPER_BEAM_SIZE}"
DECODINGS = (GREEDY, SAMPLING, BEAM)
READING = "reading … (the first prompt of a length takes longer: its program is compiled)"


@dataclasses.dataclass(frozen=True)
class DecodingChoice:
    """How an answer is decoded: one of DECODINGS, with the options of `Model.generate`."""

    kind: str = GREEDY
    max_tokens: int = 32
    temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0
    stop: tuple[str, ...] = ()


class AnswerView(NamedTuple):
    """HTML of the answer, of what it looked at, and of the status line; None leaves a part as
    it is.
    """

    answer: str | None
    look: str | None
    status: str | None


class Playground:
    """A model, with examples to try it on, for many visitors.

    Args:
      model: answers; used from several threads.
      examples: to ask about or to show as shots.
      folder: where uploads are kept, until they are read.
      fps, frames: how clips are sampled, see `Video`.
    """

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        folder: pathlib.Path,
        *,
        limits: UploadLimits | None = None,
        fps: float | None = None,
        frames: int | None = None,
    ):
        self.model, self.examples, self.folder = model, list(examples), folder
        self.limits = limits or UploadLimits()
        self._sampling: Any = {"fps": fps, "frames": frames}

    def start(self) -> Session:
        """Makes a visitor's session, with the first example as the prompt."""
        session = Session()
        if self.examples:
            session.ask(0, self.examples)
        return session

    def edit(self, session: Session, what: str, data: Mapping[str, Any]) -> str:
        """Changes a session's prompt as a click on the page asks.

        Args:
          what: "text", "clear", "up", "down", "remove", "ask", "shot", "shots" or "upload".
          data: from the page, so not to be trusted: `index`, and for "upload" `paths`.

        Returns: the HTML of the status line.
        """
        session.version += 1
        index = _number(data.get("index"))
        try:
            if what == "text":
                session.add("")
            elif what == "clear":
                session.clear()
            elif what in ("up", "down"):
                session.move(index, -1 if what == "up" else 1)
            elif what == "remove":
                session.remove(index)
            elif what == "shots":
                self._draw_shots(session, index)
            elif what == "upload":
                return self._upload(session, data)
            elif what in ("ask", "shot") and 0 <= index < len(self.examples):
                session.ask(index, self.examples) if what == "ask" else session.show(index)
        except UserError as error:
            return fragments.status(str(error), error=True)
        return fragments.status("")

    def answer(self, session: Session, choice: DecodingChoice) -> Iterator[AnswerView]:
        """Answers a session's prompt: yields the answer as it grows, then with what it looked
        at. A mistake is yielded as one sentence.
        """
        if session.running:
            yield _refused("an answer is being written: stop it first")
            return
        session.running, session.stopped = True, False
        session.maps, session.token, session.block = None, 0, None
        try:
            yield from self._answer(session, choice)
        except UserError as error:
            yield _refused(str(error))
        finally:
            session.running, session.stream = False, None

    def _answer(self, session: Session, choice: DecodingChoice) -> Iterator[AnswerView]:
        began = time.monotonic()
        prompt = session.prompt(self.examples)
        yield AnswerView(fragments.tokens([], running=True), "", fragments.status(READING))
        if choice.kind == BEAM:
            completion = self.model.generate(
                prompt, max_tokens=choice.max_tokens, beam_size=PAPER_BEAM_SIZE
            )
            ids, end = list(completion.tokens), _ending(completion.finished)
        else:
            ids, end = yield from self._streamed(session, prompt, choice)
        seconds = time.monotonic() - began
        if not ids:
            said = f"no answer: {end}"
            yield AnswerView(fragments.tokens([]), "", fragments.status(said))
            return
        maps = session.maps = self.model.attention_maps(prompt, ids)
        total = sum(token.log_probability for token in maps.tokens)
        said = f"{_rate(len(ids), seconds)}, log-probability {total:.2f}, {end}"
        yield self._view(session, maps, fragments.status(said))

    def stop(self, session: Session) -> str:
        """Cancels the answer that is being written; returns the HTML of the status line."""
        if not session.running:
            return fragments.status("nothing is being written")
        session.stopped, stream = True, session.stream
        if stream is not None:
            stream.cancel()
        return fragments.status("stopping …")

    def look(self, session: Session, data: Mapping[str, Any]) -> AnswerView:
        """Shows what a token looked at; the status line still says how the answer came about.

        data: from the page: `index` of a token, or `block`, counted from 1, 0 for the mean.
        """
        maps = session.maps
        if maps is None:
            return AnswerView(None, None, fragments.status("there is no answer to look at"))
        if "index" in data:
            session.token = min(max(_number(data["index"]), 0), len(maps.tokens) - 1)
        if "block" in data:
            block = _number(data["block"])
            session.block = block - 1 if 1 <= block <= maps.blocks else None
        return self._view(session, maps, None)

    def _streamed(
        self, session: Session, prompt: list[Any], choice: DecodingChoice
    ) -> Generator[AnswerView, None, tuple[list[int], str]]:
        """Streams an answer: yields it as it grows, and returns its ids and how it ended."""
        sampled = choice.kind == SAMPLING
        stream = session.stream = self.model.stream(
            prompt,
            max_tokens=choice.max_tokens,
            temperature=choice.temperature if sampled else 0.0,
            top_p=choice.top_p if sampled else 1.0,
            stop=choice.stop,
            seed=choice.seed,
        )
        texts: list[tuple[str, float]] = []
        if session.stopped:  # While the stream was made.
            stream.cancel()
        try:
            for token in stream:
                if token.text:  # Not the <EOC> at the end, nor a part of a character.
                    texts.append((token.text, token.log_probability))
                view = fragments.tokens(texts, running=True)
                yield AnswerView(view, None, fragments.status("writing …"))
        finally:
            # Also where the visitor leaves: the generator is closed.
            stream.cancel()
        done, end = stream.completion, self.model.tokenizer.eoc
        ids = [number for number in done.tokens if number != end]
        return ids, "stopped by you" if session.stopped else _ending(done.finished)

    def _view(self, session: Session, maps: AttentionMaps, status: str | None) -> AnswerView:
        texts = [(token.text, token.log_probability) for token in maps.tokens]
        truth = self.examples[session.asked].answer if session.asked >= 0 else ""
        answer = fragments.tokens(texts, maps=maps, chosen=session.token, truth=truth)
        return AnswerView(answer, fragments.look(maps, session.token, session.block), status)

    def _upload(self, session: Session, data: Mapping[str, Any]) -> str:
        """Adds uploaded files to the prompt; those that are refused are named, each in one
        sentence.

        data: `paths`, and `refused`: names of files that the browser or the server found too
          large to upload.
        """
        refused = [
            f"{str(name)[:80]} was not taken, since files have at most"
            f" {self.limits.megabytes} MB: give a smaller one"
            for name in _listed(data.get("refused"))
        ]
        for path in _listed(data.get("paths")):
            try:
                visual = read_upload(
                    str(path), self.folder, self.model.config, self.limits, **self._sampling
                )
                session.add(visual)
            except UserError as error:
                refused.append(str(error))
        return fragments.status("; ".join(refused), error=bool(refused))

    def _draw_shots(self, session: Session, count: int) -> None:
        """Draws shots at random among the examples that are not asked about."""
        others = [index for index in range(len(self.examples)) if index != session.asked]
        drawn = np.random.default_rng(session.version).permutation(others)
        session.shots = [int(number) for number in drawn[: max(count, 0)]]


def choice_of(
    kind: str, max_tokens: float, temperature: float, top_p: float, seed: float, stop: str
) -> DecodingChoice:
    """Makes the decoding of the page's fields, which a browser may fill with anything.

    Raises: UserError for a value that is no number.
    """
    numbers = (max_tokens, temperature, top_p, seed)
    if not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise UserError("a decoding option is not a number: fill them all in")
    if kind not in DECODINGS:
        raise UserError(f"there is no decoding {kind!r}: choose one of {', '.join(DECODINGS)}")
    stops = tuple(line for line in str(stop or "").split("\n") if line)
    return DecodingChoice(
        kind, int(max_tokens), float(temperature), float(top_p), abs(int(seed)), stops
    )


def _rate(tokens: int, seconds: float) -> str:
    """Says how fast an answer came."""
    rate = tokens / seconds
    each = f"{rate:.0f}" if rate >= 9.95 else f"{rate:.1f}"
    return f"{tokens} token{'s' * (tokens != 1)} in {seconds:.1f} s ({each} a second)"


def _refused(sentence: str) -> AnswerView:
    return AnswerView("", "", fragments.status(sentence, error=True))


def _ending(finished: bool) -> str:
    return "ended by itself" if finished else "cut off at the most tokens"


def _listed(value: Any) -> list[Any]:
    """Returns a list that the page sent, an empty one for anything else."""
    return value[:MOST_PARTS] if isinstance(value, list) else []


def _number(value: Any) -> int:
    """Returns a whole number that the page sent, -1 for anything else."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return -1


def describe(model: Model) -> str:
    """Writes a line about a model: its size, what it takes and what it makes of an image."""
    config = model.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.split(model.flamingo)[1]))
    blocks = count_blocks(config.conditioning, config.language_model)
    size = config.vision.image_size
    return (
        f"{parameters / 1e6:,.1f} M parameters · {config.language_model.layers} layers, {blocks}"
        f" cross-attention blocks · images {size} × {size} → {config.resampler.latents} visual"
        " tokens"
    )
