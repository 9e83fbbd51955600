"""Tokens to text, piece by piece, beside decoding all of them at once."""

import itertools

import pytest

from flamingo_jax.inference.answer_text import AnswerText


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Words:
    """A tokenizer whose ids are numbers of words."""

    words = ("Q", "ue", "stion", ": ", "Answer", "\n", "\n\n", "red", " ")

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[number] for number in ids)


def pieces(text: AnswerText, ids: list[int]) -> list[str]:
    found = []
    for number in ids:
        found.append(text.add(number))
        if text.stopped:
            break
    return [*found, text.finish()]


@pytest.mark.parametrize("written", ["plain", "né à 10 €", "🦩 flamingo 🦩🏽", "日本語", ""])
def test_pieces_are_whole_characters_and_join_to_the_text(written: str) -> None:
    text = AnswerText(Bytes())  # type: ignore[arg-type]
    found = pieces(text, list(written.encode()))
    assert "".join(found) == text.text == written
    assert not any("\ufffd" in piece for piece in found)
    # Nothing is held back longer than its character takes.
    assert [piece for piece in found if piece] == list(written)


def test_bytes_that_are_no_character_come_at_the_end_as_decoding_shows_them() -> None:
    text = AnswerText(Bytes())  # type: ignore[arg-type]
    ids = [*b"ab", 0xE2, 0x82]
    assert "".join(pieces(text, ids)) == text.text == Bytes().decode(ids)
    again = AnswerText(Bytes())  # type: ignore[arg-type]
    ids += list(b"c")
    assert "".join(pieces(again, ids)) == Bytes().decode(ids)


def test_every_stop_string_is_cut_wherever_tokens_end() -> None:
    """Against a search in the whole text, over all short sequences of tokens."""
    for stop in (["Question"], ["\n"], ["\n\n", "red"], ["Answer: red"], ["ueQ", "stionue"]):
        for ids in itertools.product(range(len(Words.words)), repeat=3):
            text = AnswerText(Words(), stop)  # type: ignore[arg-type]
            found = "".join(pieces(text, list(ids)))
            whole = Words().decode(list(ids))
            # The first token that completes a stop string ends the answer.
            for count in range(len(ids) + 1):
                begun = Words().decode(list(ids[:count]))
                places = [begun.find(s) for s in stop if s in begun]
                if places:
                    whole = begun[: min(places)]
                    break
            assert found == text.text == whole
            assert text.stopped == bool(places)
            if text.stopped:
                held = Words().decode(list(text.tokens))
                assert held.startswith(whole)
                assert not Words().decode(list(text.tokens[:-1])).startswith(whole) or not whole


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    text = AnswerText(Words(), ["Question"])  # type: ignore[arg-type]
    assert [text.add(n) for n in (7, 8, 0, 1, 7)] == ["red", " ", "", "", "Quered"]
    assert [text.add(n) for n in (0, 1, 2)] == ["", "", ""]
    assert text.stopped and text.finish() == "" and text.text == "red Quered"
    assert text.tokens == (7, 8, 0, 1, 7)
