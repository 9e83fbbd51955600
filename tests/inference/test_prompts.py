import numpy as np
import pytest

from flamingo_jax.errors import UserError
from flamingo_jax.inference.prefill import Prefix
from flamingo_jax.inference.prompts import (
    END_OF_CHUNK,
    after_prefix,
    bucket_length,
    collate,
    common_prefix,
    escape_image_tags,
    fill_image_tags,
    next_power,
    tokenise,
    visual_slots,
)
from flamingo_jax.processing.sequences import media_index as page_media_index
from flamingo_jax.processing.sequences import page_sequence
from flamingo_jax.processing.tokenizer import JSONTokenizer
from flamingo_jax.processing.visuals import Visual
from tests.inference.tiny_models import make_tokenizer
from tests.processing.test_tokenizer import JSONS

TOKENIZER = make_tokenizer()
FIRST, SECOND, THIRD = (Visual(np.full((1, 4, 4, 3), value, np.uint8)) for value in (1, 2, 3))


@pytest.mark.parametrize(
    "texts",
    [
        ["", "Output: a red circle", "Output:"],
        ["this is a star", "a circle", "", " at the top"],
    ],
)
def test_a_prompt_is_an_open_training_page(texts: list[str]) -> None:
    visuals = [FIRST, SECOND, THIRD][: len(texts) - 1]
    parts = [
        texts[0],
        *(part for visual, text in zip(visuals, texts[1:], strict=True) for part in (visual, text)),
    ]
    made = tokenise([part for part in parts if part != ""], TOKENIZER)
    page = page_sequence(texts, TOKENIZER, close=False)
    np.testing.assert_array_equal(made.tokens, page.tokens)
    np.testing.assert_array_equal(
        made.media_index, page_media_index(page.chunk, len(visuals), "previous")
    )
    assert made.visuals == visuals


def test_text_only_examples_are_closed_once_and_see_nothing() -> None:
    made = tokenise(
        ["Output: a star", END_OF_CHUNK, "Output: a circle", END_OF_CHUNK, FIRST, "Output:"],
        TOKENIZER,
    )
    encode = TOKENIZER.encode
    expected = [
        TOKENIZER.bos,
        *encode("Output: a star"),
        TOKENIZER.eoc,
        *encode("Output: a circle"),
        TOKENIZER.eoc,
        *encode("<image>"),
        *encode("Output:"),
    ]
    assert made.tokens.tolist() == expected
    seen = len(encode("<image>")) + len(encode("Output:"))
    assert made.media_index.tolist() == [-1] * (len(expected) - seen) + [0] * seen


def test_neighbouring_texts_are_one_text() -> None:
    np.testing.assert_array_equal(
        tokenise(["a re", "d circle"], TOKENIZER).tokens,
        tokenise(["a red circle"], TOKENIZER).tokens,
    )


def test_literal_tags_are_filled_in_order() -> None:
    assert fill_image_tags(["<image>a star<image>", FIRST, "Output:", SECOND]) == [
        FIRST,
        "a star",
        SECOND,
        "Output:",
    ]
    assert fill_image_tags(["a star", FIRST]) == ["a star", FIRST]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["<image><image>a"], "more image tags than images"),
        (["<image>", FIRST, SECOND], "more images"),
    ],
)
def test_tags_and_images_must_agree(parts: list[str | Visual], said: str) -> None:
    with pytest.raises(UserError, match=said):
        tokenise(parts, TOKENIZER)


@pytest.mark.parametrize("text", [r"what is \<image> ?", r"\<image>", r"a \<image>\<image> b"])
def test_an_escaped_tag_is_mere_text(text: str) -> None:
    assert fill_image_tags([text, FIRST]) == [text, FIRST]
    made = tokenise([text, FIRST], TOKENIZER)
    (tag,) = TOKENIZER.image_tag_ids
    assert made.tokens.tolist().count(tag) == 1 and made.visuals == [FIRST]
    # The words are there, without the backslash.
    words = JSONTokenizer(*JSONS["bytes"])
    assert words.decode(tokenise([text], words).tokens.tolist()) == text.replace("\\", "")
    # Beside a tag that is one.
    assert fill_image_tags([text + "<image>", FIRST]) == [text, FIRST]
    assert fill_image_tags([escape_image_tags("<image>")]) == [r"\<image>"]


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (np.zeros((1, 4, 4, 3), np.float32), "are float32, but must be .* uint8"),
        (np.zeros((1, 4, 4, 3), bool), "are bool"),
        ([[1]], "are list"),
        (np.zeros((4, 4, 3), np.uint8), r"shape \[4, 4, 3\], .* image\[None\]"),
        (np.zeros((1, 4, 4, 1), np.uint8), "three equal channels"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"shape \[0, 4, 4, 3\]"),
    ],
)
def test_frames_that_are_none_are_refused(frames: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Visual(frames)  # type: ignore[arg-type]


def test_a_batch_holds_each_different_image_once() -> None:
    again = Visual(FIRST.frames.copy())
    prompts = [
        tokenise([FIRST, "a", SECOND, "a"], TOKENIZER),
        tokenise([again, "a star"], TOKENIZER),
    ]
    batch = collate(prompts, rows=4, length=32, slots=3, pad_token=TOKENIZER.pad)
    assert batch.distinct == [FIRST, SECOND]
    assert batch.visuals.tolist() == [[0, 1, -1], [0, -1, -1], [0, 1, -1], [0, 1, -1]]
    assert batch.lengths.tolist() == [len(prompts[row].tokens) for row in (0, 1, 0, 0)]
    np.testing.assert_array_equal(batch.tokens[1, : batch.lengths[1]], prompts[1].tokens)
    assert (batch.media_index[1, batch.lengths[1] :] == -1).all()


def test_sizes_are_rounded_up() -> None:
    assert [bucket_length(n) for n in (1, 32, 33, 65, 97, 129, 193, 257, 385)] == [
        32,
        32,
        64,
        96,
        128,
        192,
        256,
        384,
        512,
    ]
    assert [next_power(2, n) for n in (0, 1, 2, 3, 64, 65)] == [0, 1, 2, 4, 64, 128]
    assert [visual_slots(n) for n in range(8)] == [0, 1, 2, 3, 4, 6, 6, 8]
    assert [visual_slots(n) for n in (9, 13, 320)] == [12, 16, 384]
    assert [next_power(4, n) for n in (0, 1, 2, 5, 16, 17)] == [0, 1, 4, 16, 16, 64]


def test_a_common_prefix_ends_where_a_token_or_its_visual_differs() -> None:
    made = [
        tokenise(parts, TOKENIZER)
        for parts in (
            [FIRST, "Output: a red circle", SECOND, "Output:"],
            [FIRST, "Output: a red circle", THIRD, "Output: a"],
            [FIRST, "Output: a red star", SECOND, "Output:"],
            [SECOND, "Output: a red circle", SECOND, "Output:"],
        )
    ]
    tag = int(np.flatnonzero(made[0].tokens == TOKENIZER.image_tag_ids[0])[1])
    assert common_prefix(made[:2]) == tag
    assert common_prefix(made[:3]) == len(tokenise([FIRST, "Output: a red"], TOKENIZER).tokens)
    assert common_prefix(made) == 1
    # The last token of a prompt is never part of it.
    assert common_prefix([made[0], made[0]]) == len(made[0].tokens) - 1
    prefix = Prefix(np.zeros((1, 1, 1, 64, 1)), np.int32(tag))
    rest = after_prefix(made[0], tag, prefix, attend_to_media="last")
    assert rest.tokens.tolist() == made[0].tokens[tag:].tolist()
    assert rest.visuals == [SECOND] and not rest.media_index.any()
    assert rest.padded_length == 32 + 64
    rest = after_prefix(made[0], tag, prefix, attend_to_media="all_previous")
    assert rest.visuals == [FIRST, SECOND] and (rest.media_index == 1).all()
