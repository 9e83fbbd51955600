"""The layout of pages and pairs, and phi, against the digits printed in the paper's figure 7."""

import numpy as np
import pytest

from flamingo_jax.processing.sequences import (
    media_index,
    page_sequence,
    pair_overhead,
    pair_sequence,
    text_tokens,
)

BOS, EOS, EOC = 1, 2, 1000


class Words:
    """Every word is a token, and the image tag is three."""

    bos, eos, eoc, image_tag_ids = BOS, EOS, EOC, (7, 8, 9)

    def encode(self, text: str) -> list[int]:
        return [100 + len(word) for word in text.split()]


def test_phi_is_the_papers():
    """`<BOS> Cute pics of my pets!<EOC><image>My puppy sitting in the grass.<EOC><image> My cat
    looking very dignified.<EOC>`.
    """
    page = page_sequence(
        [
            "Cute pics of my pets !",
            "My puppy sitting in the grass .",
            "My cat looking very dignified .",
        ],
        Words(),
    )
    without_end = page.chunk[:-1]
    assert "".join(map(str, without_end)) == "0" * 8 + "1" * 11 + "2" * 10
    np.testing.assert_array_equal(media_index(page.chunk, 2, "previous"), page.chunk - 1)
    np.testing.assert_array_equal(
        media_index(without_end, 2, "next"), [0] * 8 + [1] * 11 + [-1] * 10
    )


def test_page_layout():
    page = page_sequence(["one", "two two", ""], Words())
    tag = [7, 8, 9]
    assert page.tokens.tolist() == [BOS, 103, EOC, *tag, 103, 103, EOC, *tag, EOC, EOS]
    assert page.is_text.tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    assert page.chunk.tolist() == [0] * 3 + [1] * 6 + [2] * 5
    prompt = page_sequence(["one", "two two", ""], Words(), close=False)
    np.testing.assert_array_equal(prompt.tokens, page.tokens[:-2])


def test_no_eoc_directly_after_bos():
    page = page_sequence(["", "two"], Words())
    assert page.tokens.tolist() == [BOS, 7, 8, 9, 103, EOC, EOS]
    np.testing.assert_array_equal(pair_sequence("two", Words()).tokens, page.tokens)


@pytest.mark.parametrize("length", [6, 7, 8, 30])
def test_a_long_caption_is_cut_before_its_end_marks(length):
    pair = pair_sequence("a b c d e f", Words(), length=length)
    kept = min(6, length - pair_overhead(Words()))
    assert pair.tokens.tolist() == [BOS, 7, 8, 9] + [101] * kept + [EOC, EOS]
    assert len(pair) <= length


def test_text_without_visuals():
    assert text_tokens("a bb", Words()).tolist() == [BOS, 101, 102, EOS]
    page = page_sequence(["a"], Words())
    assert page.tokens.tolist() == [BOS, 101, EOC, EOS]
    assert (
        media_index(page.chunk, 0, "next").tolist()
        == media_index(page.chunk, 0, "previous").tolist()
        == [-1] * 4
    )
