"""An answer's tokens as text, piece by piece: characters that span several tokens, and stop
strings that do.
"""

from collections.abc import Sequence

from flamingo_jax.processing.tokenizer import Tokenizer

UNDECODED = "\ufffd"
"""What stands for the bytes of a character that is not complete yet."""


class AnswerText:
    """Decodes tokens as they come.

    The pieces that `add` and `finish` return are, one after the other, the text of all tokens,
    up to the first stop string. Text is held back while it may still change: at the end of
    an incomplete character, and where a stop string may have begun.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._given = ""
        self._cut: str | None = None

    @property
    def watches(self) -> bool:
        """Returns whether there are stop strings to look for."""
        return bool(self._stop)

    @property
    def stopped(self) -> bool:
        """Returns whether a stop string was found."""
        return self._cut is not None

    @property
    def text(self) -> str:
        """Returns the text so far, as it is given at the end."""
        return self._decoded() if self._cut is None else self._cut

    @property
    def tokens(self) -> tuple[int, ...]:
        """Returns the ids of the text: all, or those that a stop string leaves some text of."""
        if self._cut is None:
            return tuple(self._ids)
        # The least number of tokens whose text holds all that is left.
        count = len(self._ids)
        while count and self._tokenizer.decode(self._ids[: count - 1]).startswith(self._cut):
            count -= 1
        return tuple(self._ids[:count])

    def add(self, token: int) -> str:
        """Adds a token, and returns the text that is certain now."""
        self._ids.append(token)
        text = self._decoded()
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self._cut = text[: min(found)]
            return self._give(self._cut)
        certain = text.rstrip(UNDECODED)
        return self._give(certain[: len(certain) - self._begun(certain)])

    def finish(self) -> str:
        """Returns the text that was held back, after the last token."""
        return self._give(self.text)

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _begun(self, text: str) -> int:
        """Returns how many characters at the end of `text` may begin a stop string."""
        return max(
            (
                count
                for stop in self._stop
                for count in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:count])
            ),
            default=0,
        )

    def _give(self, text: str) -> str:
        """Returns what `text` adds to the text given so far."""
        if len(text) <= len(self._given) or not text.startswith(self._given):
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece
