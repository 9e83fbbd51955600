"""A window against a token-by-token reading of the rules; a text's pieces against the text."""

import numpy as np
import pytest

from data_pipelines.transforms.windows import text_pieces, window
from flamingo_jax.processing.sequences import page_sequence

EOC = 1000


class Characters:
    """A token per character; the image tag is three tokens."""

    bos, eos, eoc, image_tag_ids = 1, 2, EOC, (7, 8, 9)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


PAGES = [
    ["ab", "cdefg", "", "hi", "jklmnop"],
    ["", "abc", "defg"],
    ["abcdefgh"],
    ["abc", "d", "e", "f", "g", "h"],
]


def by_hand(page, start, length, limit, look):
    """Walks the tokens: a visual is seen where its tag starts in the window and it is among the
    first `limit` of those.
    """
    tags = [i for i, token in enumerate(page.tokens) if token == 7]
    inside = [number for number, place in enumerate(tags) if start <= place < start + length][
        :limit
    ]
    index = []
    for i in range(start, min(start + length, len(page))):
        before = [number for number, place in enumerate(tags) if place <= i]
        after = [number for number, place in enumerate(tags) if place > i]
        looked = (before[-1:] if look == "previous" else after[:1]) or [None]
        index.append(inside.index(looked[0]) if looked[0] in inside else -1)
    return inside, index


@pytest.mark.parametrize("texts", PAGES)
@pytest.mark.parametrize("look", ["previous", "next"])
@pytest.mark.parametrize("length, limit", [(4, 1), (6, 2), (9, 5), (100, 3), (100, 9)])
def test_window_is_the_rules_read_one_by_one(texts, look, length, limit):
    page = page_sequence(texts, Characters())
    for start in range(max(len(page) - length, 0) + 1):
        made = window(page, start, length, limit, look)
        inside, index = by_hand(page, start, length, limit, look)
        assert list(made.visuals) == inside
        assert made.media_index.tolist() == index
        np.testing.assert_array_equal(made.tokens, page.tokens[start : start + length])
        assert not made.loss_mask[0]
        np.testing.assert_array_equal(made.loss_mask[1:], ~np.isin(made.tokens[1:], [1, 7, 8, 9]))


def test_text_of_an_image_before_the_window_sees_none():
    page = page_sequence(["", "abcdef", "ghi"], Characters())
    made = window(page, 4, 20, 5, "previous")
    assert made.tokens[0] == ord("a")
    assert made.media_index.tolist() == [-1] * 7 + [0] * 8
    assert made.visuals == range(1, 2)


@pytest.mark.parametrize("tokens", [1, 2, 5, 6, 7, 9, 10, 41])
def test_every_token_of_a_text_but_the_first_is_a_target_once(tokens):
    targets = [start + i for start, length in text_pieces(tokens, 5) for i in range(1, length)]
    assert targets == list(range(1, tokens))
    assert all(2 <= length <= 5 for _, length in text_pieces(tokens, 5)) or tokens == 1
