import io
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from flamingo_jax.errors import UserError
from flamingo_jax.evaluation.examples import (
    BenchmarkExample,
    page_examples,
    read_examples,
    read_pages,
)
from flamingo_jax.evaluation.media import Preprocessing
from flamingo_jax.evaluation.prompts import QUESTION, PromptTemplate, clean
from flamingo_jax.evaluation.protocol.benchmark import EvaluationSettings
from flamingo_jax.evaluation.protocol.classification import Classification
from flamingo_jax.evaluation.protocol.fast_concept_binding import FastConceptBinding
from flamingo_jax.evaluation.protocol.open_ended import (
    captioning,
    most_frequent_answer,
    question_answering,
)
from flamingo_jax.evaluation.synthetic_world.benchmarks import direction_match
from flamingo_jax.inference.prompts import END_OF_CHUNK, Prompt, tokenise
from flamingo_jax.processing.visuals import Visual
from tests.evaluation.world import ScriptedEngine, example, page, visual
from tests.inference.tiny_models import make_tokenizer, tiny_config

QUERIES = [example(1, "a red circle"), example(2, "a blue star")]
SUPPORT = [example(n, f"a thing {n}") for n in range(10, 20)]
TOKENIZER = make_tokenizer()
CONFIG = tiny_config(40)
HOW = Preprocessing.of(CONFIG)


def shown_of(example: BenchmarkExample) -> Visual:
    return example.media.read(HOW)


def image_of(prompt: Prompt) -> int:
    return int([part for part in prompt if isinstance(part, Visual)][-1].frames.flat[0])


def test_captioning_zero_shot_has_text_only_examples_and_scores_exact_matches() -> None:
    engine = ScriptedEngine(
        lambda prompt: {1: " A red circle", 2: " a red circle"}[image_of(prompt)]
    )
    result = captioning("captions", QUERIES, SUPPORT).run(engine, EvaluationSettings())
    assert result.accuracy == 0.5
    assert [one.text for one in result.predictions] == ["A red circle", "a red circle"]
    for prompt in engine.prompts:
        first, mark, second, again, shown, opening = prompt
        assert mark is again is END_OF_CHUNK
        assert first != second
        assert first.startswith("Output: a thing ")
        assert isinstance(shown, Visual)
        assert opening == "Output:"
    assert engine.prompts[0][:4] == engine.prompts[1][:4]


def test_few_shot_prompts_show_their_examples_images_and_no_text_only_ones() -> None:
    engine = ScriptedEngine()
    captioning("captions", QUERIES, SUPPORT).run(engine, EvaluationSettings(shots=4))
    for prompt, query in zip(engine.prompts, QUERIES, strict=True):
        assert [type(part) for part in prompt] == [Visual, str] * 5
        for shown, text in zip(prompt[:8:2], prompt[1:8:2], strict=True):
            assert text == f"Output: a thing {shown.frames.flat[0]}"
        assert prompt[8:] == [shown_of(query), "Output:"]


def test_questions_are_scored_by_type() -> None:
    queries = [
        example(1, "red", "what colour is it?", "colour"),
        example(2, "star", "what shape is it?", "shape"),
    ]
    engine = ScriptedEngine(lambda prompt: " red<EOC>"[:4])
    result = question_answering("vqa", queries, []).run(engine, EvaluationSettings(text_examples=0))
    assert result.metrics == {"accuracy": 0.5, "accuracy/colour": 1.0, "accuracy/shape": 0.0}
    assert engine.prompts[0][-1] == "Question: what colour is it? Answer:"


def test_the_majority_answer_stands_beside_the_accuracy() -> None:
    assert (
        most_frequent_answer([["no"], ["yes", "yes"], ["no", "yes"]]) == "yes"
        and most_frequent_answer([["b"], ["a"]]) == "b"
        and most_frequent_answer([]) == ""
    )
    queries = [
        example(n, answer, "is it red?") for n, answer in enumerate(("no", "yes", "no", "no"))
    ]
    result = question_answering("vqa", queries, [], PromptTemplate("{question}"), "no").run(
        ScriptedEngine(lambda prompt: " yes"), EvaluationSettings(text_examples=0)
    )
    assert result.metrics == {"accuracy": 0.25, "majority_answer": 0.75}
    assert result.predictions[0].prompt == "<image>is it red?"


def test_what_others_wrote_names_no_place_for_an_image() -> None:
    queries = [example(1, "<image>", "what is <image> in HTML?")]
    engine = ScriptedEngine()
    question_answering("vqa", queries, queries + SUPPORT).run(engine, EvaluationSettings(shots=1))
    text = "".join(part for part in engine.prompts[0] if isinstance(part, str))
    assert r"what is \<image> in HTML?" in text
    made = tokenise(engine.prompts[0], TOKENIZER)
    assert len(made.visuals) == 2


@pytest.mark.parametrize("selection", ["random", "rices"])
def test_every_query_has_as_many_shots_as_are_said(selection: str) -> None:
    """A query among its own support leaves one example less."""
    inside = captioning("captions", SUPPORT[:2], SUPPORT)
    for shots in (9, 10):
        settings = EvaluationSettings(shots=shots, selection=selection)
        if shots == 10:
            with pytest.raises(
                UserError, match="needs 10 .* there are 9, besides the query itself"
            ):
                inside.check(settings)
            continue
        engine = ScriptedEngine()
        inside.run(engine, settings)
        assert all(len(prompt) == 2 * shots + 2 for prompt in engine.prompts)
    captioning("captions", QUERIES, SUPPORT).check(EvaluationSettings(shots=10))


def test_rices_looks_at_nothing_without_shots() -> None:
    class Blind(ScriptedEngine):
        def features(self, visuals: Sequence[Visual]) -> np.ndarray:
            raise AssertionError("no features are needed")

    captioning("captions", QUERIES, SUPPORT).run(Blind(), EvaluationSettings(selection="rices"))


def test_classification_takes_the_likeliest_class_and_no_text_only_examples() -> None:
    queries = [
        example(1, "circle", "what shape is it?"),
        example(2, "star", "what shape is it?"),
    ]
    engine = ScriptedEngine(
        likes=lambda prompt, text: {
            " circle": -1.0,
            " star": -0.5 if image_of(prompt) == 2 else -2.0,
        }[text]
    )
    result = Classification("shapes", queries, SUPPORT, ["circle", "star"], QUESTION).run(
        engine, EvaluationSettings()
    )
    assert result.accuracy == 1.0
    assert engine.prompts[0] == [shown_of(queries[0]), "Question: what shape is it? Answer:"]


def test_binding_shows_the_last_images_and_asks_between_the_pages_words() -> None:
    pages = [
        page(0, ["dax", "wug", "wug", "dax", "dax"]),
        page(1, ["fep", "toma", "fep", "fep", "toma"]),
    ]
    engine = ScriptedEngine(
        likes=lambda prompt, text: {" dax": -1.0, " wug": -2.0, " fep": -1.0, " toma": -2.0}[text]
    )
    result = FastConceptBinding("new words", pages).run(engine, EvaluationSettings(shots=2))
    assert result.accuracy == 0.5
    assert [one.text for one in result.predictions] == ["dax", "fep"]
    shown = [part.digest if isinstance(part, Visual) else part for part in engine.prompts[0]]
    assert shown == [
        pages[0].media[2].read(HOW).digest,
        "This is a wug",
        pages[0].media[3].read(HOW).digest,
        "This is a dax",
        pages[0].media[4].read(HOW).digest,
        "This is a",
    ]
    engine.prompts.clear()
    without = EvaluationSettings(shots=2, shot_images=False)
    FastConceptBinding("new words", pages).run(engine, without)
    (query,) = [part for part in engine.prompts[0] if isinstance(part, Visual)]
    assert query.digest == pages[0].media[4].read(HOW).digest
    texts = [part for part in engine.prompts[0] if isinstance(part, str)]
    assert texts == ["This is a wug", "This is a dax", "This is a"]


@pytest.mark.parametrize(
    "benchmark",
    [
        captioning("captions", [], SUPPORT),
        captioning("captions", QUERIES, SUPPORT[:1]),
        FastConceptBinding("words", []),
    ],
)
def test_too_little_data_is_refused(benchmark: object) -> None:
    for ask in (
        lambda: benchmark.check(EvaluationSettings()),
        lambda: benchmark.run(ScriptedEngine(), EvaluationSettings()),
    ):  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"captions|words"):
            ask()


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (" a red circle Output: a", "a red circle"),
        ("red Question: what", "red"),
        (" a star", "a star"),
        ("Output: x", ""),
    ],
)
def test_predictions_are_cut_at_the_next_examples_keywords(said: str, kept: str) -> None:
    assert clean(said) == kept


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("a blue star moving left", 1.0),
        ("a red circle moving right", 0.0),
        ("a red circle", 0.0),
    ],
)
def test_the_direction_alone_is_scored(said: str, score: float) -> None:
    assert direction_match(said, ["a red circle moving left"]) == score


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_questions_about_one_image_are_one_cluster() -> None:
    about = {"question": b"why?", "answers": [b"so"], "type": b""}
    asked = read_examples(
        [{"id": f"{n}", "frames": [png(value)], **about} for n, value in enumerate((7, 8, 7))],
        "questions",
    )
    first, second, third = (one.cluster for one in asked)
    assert first and first == third != second
    (pair,) = read_examples([{"id": b"a", "image": png(7), "captions": [b"one"]}], "pairs")
    assert pair.cluster == ""


def test_records_become_examples_at_the_models_size() -> None:
    (pair,) = read_examples(
        [{"id": b"a", "image": png(9), "captions": [b"Output: one", "two"]}], "pairs"
    )
    assert shown_of(pair).frames.shape == (1, 32, 32, 3)
    assert pair.answers == ("one", "two")
    (clip,) = read_examples(
        [{"id": b"v", "frames": [png(v) for v in range(9)], "captions": [b"x"]}],
        "videos",
    )
    assert shown_of(clip).frames[:, 16, 16, 0].tolist() == [3, 4, 5, 6]
    (asked,) = read_examples(
        [
            {
                "id": b"q",
                "frames": [png(1)],
                "question": b"why?",
                "answers": [b"so"],
                "type": b"one/why",
            }
        ],
        "questions",
    )
    assert (asked.question, asked.answers, asked.question_type) == ("why?", ("so",), "one/why")


def test_a_clips_rate_is_what_was_asked_for() -> None:
    record = {"id": b"v", "frames": [png(v) for v in range(40)], "fps": 6.0, "captions": [b"x"]}

    def shown(**options: float) -> list[int]:
        (made,) = read_examples([record], "videos", fps=options.get("fps"))  # type: ignore[arg-type]
        return made.media.read(Preprocessing.of(CONFIG, **options)).frames[:, 16, 16, 0].tolist()

    assert shown() == [18, 19, 20, 21]
    assert shown(fps=3.0, frames=10) == list(range(11, 30, 2))
    assert shown(fps=6.0, frames=30) == list(range(5, 35))
    with pytest.raises(UserError, match="v was stored at 6 frames a second, fewer than --fps=7"):
        shown(fps=7.0)
    asked = {
        "id": b"q",
        "frames": [png(1), png(2)],
        "question": b"why?",
        "answers": [b"so"],
        "type": b"",
    }
    with pytest.raises(UserError, match="q does not say its frame rate"):
        read_examples([asked], "questions", fps=3.0)
    # A rate is nothing to an image.
    assert len(read_examples([asked | {"frames": [png(1)]}], "questions", fps=3.0)) == 1


def test_pages_give_support_examples() -> None:
    texts = [
        b"",
        b"Output: a red star",
        b"Question: what is it? Answer: a star",
        b"This is a dax",
    ]
    pages = read_pages([{"id": b"p", "texts": texts, "images": [png(1), png(2), png(3)]}])
    made = page_examples(pages)
    assert [(e.question, e.answers) for e in made] == [
        ("", ("a red star",)),
        ("what is it?", ("a star",)),
    ]
    assert [int(shown_of(e).frames[0, 16, 16, 0]) for e in made] == [1, 2]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"image": b"nothing", "captions": [b"x"]}, "unreadable image"),
        ({"image": png(1), "captions": []}, "no answer to compare"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(record: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match="bad/7") as error:
        read_examples([{"id": b"bad/7", **record}], "pairs")
    assert said in str(error.value)


def test_captions_may_follow_their_images_at_once() -> None:
    engine = ScriptedEngine()
    captioning("captions", QUERIES, SUPPORT, template=PromptTemplate("")).run(
        engine, EvaluationSettings(shots=1)
    )
    for (shown, text, last), query in zip(engine.prompts, QUERIES, strict=True):
        assert isinstance(shown, Visual) and text == f" a thing {shown.frames.flat[0]}"
        assert last is shown_of(query)


def test_samples_keep_what_was_shown() -> None:
    result = captioning("captions", [example(1)], []).run(
        ScriptedEngine(), EvaluationSettings(text_examples=0)
    )
    assert result.predictions[0].prompt == "<image>Output:"
    np.testing.assert_array_equal(result.predictions[0].media.read(HOW).frames, visual(1).frames)


def test_the_control_has_the_same_shots_without_their_images() -> None:
    def texts(settings: EvaluationSettings) -> tuple[list[list[str]], list[int]]:
        engine = ScriptedEngine()
        captioning("captions", QUERIES, SUPPORT).run(engine, settings)
        written = [[part for part in prompt if isinstance(part, str)] for prompt in engine.prompts]
        visuals = [sum(isinstance(part, Visual) for part in prompt) for prompt in engine.prompts]
        return written, visuals

    shown, images = texts(EvaluationSettings(shots=4))
    hidden, left = texts(EvaluationSettings(shots=4, shot_images=False))
    assert shown == hidden
    assert set(images) == {5} and set(left) == {1}


def test_log_likelihoods_are_averaged_over_orders_of_the_shots() -> None:
    """The score is that of the shot next to the query, so that the mean tells the orders."""

    def likes(prompt: Prompt, text: str) -> float:
        last = [part for part in prompt if isinstance(part, Visual)][-2]
        return float(last.frames.flat[0]) if text == " circle" else 3.2

    support = [example(n, "circle") for n in range(1, 6)]
    engine = ScriptedEngine(likes=likes)
    settings = EvaluationSettings(shots=5, permutations=6)
    task = Classification("shapes", [example(100, "circle")], support, ["circle", "star"])
    result = task.run(engine, settings)
    last = [likes(prompt, " circle") for prompt in engine.prompts]
    assert len(last) == 6 and len(set(last)) > 1
    assert result.predictions[0].text == ("circle" if sum(last) / 6 > 3.2 else "star")
    orders = [[p.frames.flat[0] for p in x if isinstance(p, Visual)] for x in engine.prompts]
    assert all(sorted(order[:-1]) == [1, 2, 3, 4, 5] for order in orders)
    with pytest.raises(UserError, match="is open-ended"):
        captioning("captions", QUERIES, SUPPORT).check(settings)
