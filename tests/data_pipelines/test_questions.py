"""Questions about images: rows that share a visual, contrastive texts, questions read as texts."""

import numpy as np
import pytest

from data_pipelines.transforms.lengths import load_or_measure, measure
from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.examples import BenchmarkExample
from flamingo_jax.evaluation.media import LoadedMedia
from flamingo_jax.evaluation.prompts import QUESTION, few_shot
from flamingo_jax.inference.prompts import tokenise
from flamingo_jax.processing.visuals import Visual
from tests.data_pipelines.toy_data import (
    SIZE,
    broken,
    iterator,
    masked,
    questions,
    segments_of,
    shared_questions,
    take,
)


def test_of_a_question_the_answer_and_its_end_alone_are_learned(tokenizer):
    """In the very tokens that a prompt and its continuation have; one of its answers on each
    visit; several to a row, each with its own frames.
    """
    it = iterator("flamingo", "questions", tokenizer, source=questions(6), batch_size=1)
    told, packed = {}, False
    for _ in range(40):
        batch = next(it)
        packed |= batch["segments"].max() > 1
        for mask in segments_of(batch, 0):
            tokens, learned, index = (
                batch[name][0][mask] for name in ("tokens", "loss_mask", "media_index")
            )
            number = int(tokenizer.decode(tokens.tolist()).split(" n")[1].split()[0])
            visual = Visual(np.zeros((1, SIZE, SIZE, 3), np.uint8))
            example = BenchmarkExample(
                "",
                LoadedMedia(visual),
                ("",),
                questions(6)[number]["question"],
            )
            written = few_shot(example, [], [], QUESTION)
            prompt = tokenise(
                [visual if part is example.media else part for part in written], tokenizer
            )
            answer = tokens[len(prompt.tokens) : -2]
            np.testing.assert_array_equal(tokens[: len(prompt.tokens)], prompt.tokens)
            np.testing.assert_array_equal(index[: len(prompt.tokens)] >= 0, prompt.media_index >= 0)
            assert tokens[-2:].tolist() == [tokenizer.eoc, tokenizer.eos]
            np.testing.assert_array_equal(
                np.flatnonzero(learned), np.arange(len(prompt.tokens), len(tokens) - 1)
            )
            told.setdefault(number, set()).add(tokenizer.decode(answer.tolist()))
            place = batch["visuals"][0][index[1]]
            reds = (
                batch["images"][place][batch["frame_mask"][place]][:, 0, 0, 0].astype(int)
                - 7 * number
            )
            assert (
                reds.tolist() == [0]
                if number % 2 == 0
                else reds[0] in (0, 1, 2) and reds[1] == reds[0] + 1
            )
    it.close()
    assert packed and told == {
        number: {" red", " blue a"} if number % 2 else {" red"} for number in range(6)
    }


def test_questions_about_one_image_share_it_in_a_row(tokenizer):
    """Three of them fit a row, and the seventh is alone with its image; each is packed as it
    would be with an image of its own.
    """
    longest = int(measure(shared_questions(), "questions", tokenizer, QUESTION.text).tokens.max())
    options = dict(
        source=shared_questions(), batch_size=1, max_length=3 * longest, visuals=1, frames=1
    )
    apart = {}
    for batch in take(iterator("flamingo", "questions", tokenizer, pack=False, **options), 7):
        tokens = batch["tokens"][0][batch["segments"][0] == 1]
        apart[tokens.tobytes()] = (
            batch["loss_mask"][0][: len(tokens)],
            batch["media_index"][0][: len(tokens)],
            batch["images"],
        )
    it = iterator("flamingo", "questions", tokenizer, **options)
    assert it.summary()["rows"] == 3
    numbers = []
    for batch in take(it, 3):
        numbers.append(int(batch["segments"].max()))
        assert (
            batch["images"].shape[0] == 1
            and batch["frame_mask"].all()
            and batch["visuals"].tolist() == [[0]]
        )
        for mask in segments_of(batch, 0):
            learned, index, images = apart.pop(batch["tokens"][0][mask].tobytes())
            np.testing.assert_array_equal(batch["loss_mask"][0][mask], learned)
            np.testing.assert_array_equal(batch["media_index"][0][mask], index)
            np.testing.assert_array_equal(batch["images"], images)
    assert sorted(numbers) == [1, 3, 3] and not apart
    # Two fit a row: three of them are parted as evenly as can be.
    short = iterator(
        "flamingo", "questions", tokenizer, **(options | {"max_length": 2 * longest, "visuals": 2})
    )
    assert (
        short.summary()["too_long"] == 0
        and max(int(batch["segments"].max()) for batch in take(short, 6)) == 2
    )


def test_contrastive_texts_of_questions_are_those_of_their_image(tokenizer):
    source = shared_questions(12)
    texts, numbers = set(), []
    for batch in take(
        iterator(
            "contrastive",
            "questions",
            tokenizer,
            source=source,
            batch_size=4,
            prompt="{question}",
        ),
        12,
    ):
        for row in range(4):
            ids = batch["tokens"][row][batch["mask"][row]]
            assert ids[0] == tokenizer.bos and ids[-1] == tokenizer.eos
            text = tokenizer.decode(ids.tolist())
            texts.add(text)
            number = int(batch["images"][row, 0, 0, 0])
            numbers.append(number)
            asks = {int(word.split("n")[1]) // 3 for word in text.split() if word[-1].isdigit()}
            assert asks == {number} and text.endswith(" red")
    assert sorted(numbers) == sorted([0, 1, 2, 3] * 12) and len(texts) > 8


def test_a_bad_image_blanks_all_questions_that_share_it(tokenizer):
    source = broken(shared_questions(), {0, 1, 2})
    it = iterator(
        "flamingo",
        "questions",
        tokenizer,
        source=source,
        batch_size=1,
        max_length=200,
        visuals=2,
        frames=1,
    )
    lost = 0
    for batch in take(it, it.summary()["rows"]):
        for mask in segments_of(batch, 0):
            text = tokenizer.decode(batch["tokens"][0][mask].tolist())
            blank = int(text.split(" n")[1].split()[0]) < 3
            lost += blank
            read = masked(batch)
            assert (
                read["loss_mask"][0][mask].any() != blank
                and (read["media_index"][0][mask] >= 0).any() != blank
            )
    assert lost == 3 and it.summary()["failed"] == ["question0"]


def test_questions_as_text_are_the_same_words_without_a_visual(tokenizer):
    it = iterator(
        "language_modelling",
        "questions",
        tokenizer,
        source=questions(4),
        batch_size=1,
        visuals=0,
        max_length=256,
    )
    batch = next(it)
    assert batch["segments"].max() == 4 == it.summary()["records"]
    it.close()
    for mask in segments_of(batch, 0):
        tokens = batch["tokens"][0][mask]
        text = tokenizer.decode(tokens.tolist())
        number = int(text.split(" n")[1].split()[0])
        assert text in {
            f"Question: {questions(4)[number]['question']} Answer: {answer}"
            for answer in ("red", "blue a")
        }
        assert (
            tokens[0] == tokenizer.bos
            and tokens[-1] == tokenizer.eos
            and batch["loss_mask"][0][mask].tolist() == [False] + [True] * (len(tokens) - 1)
        )


def test_a_question_too_long_for_a_row_is_left_out_and_counted(tokenizer):
    source = [*questions(5), questions(6)[5] | {"question": "star " * 100}]
    it = iterator("flamingo", "questions", tokenizer, source=source, batch_size=1)
    assert (it.summary()["too_long"], it.summary()["cut"]) == (1, 0)
    it.close()
    other = iterator(
        "flamingo",
        "questions",
        tokenizer,
        source=questions(2),
        prompt="{question}",
        batch_size=1,
    )
    assert tokenizer.decode(next(other)["tokens"][0].tolist()).startswith(
        ("<image>n0 star or circle? red", "<image>n1 star or circle? ")
    )
    other.close()
    with pytest.raises(UserError, match="has no {question} in it"):
        iterator("flamingo", "questions", tokenizer, prompt="Answer:")


def test_lengths_of_questions_are_kept_by_prompt(tokenizer, tmp_path):
    sizes = [
        int(
            load_or_measure(questions(2), "questions", tokenizer, tmp_path, "train", prompt).tokens[
                0
            ]
        )
        for prompt in ("{question}", "a {question}")
    ]
    assert (
        sizes[1] == sizes[0] + len(tokenizer.encode("a n0")) - len(tokenizer.encode("n0"))
        and len(list(tmp_path.iterdir())) == 2
    )
