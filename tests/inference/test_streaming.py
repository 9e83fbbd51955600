"""Continuous batching and streams of a real, tiny Flamingo, beside one prompt at a time."""

import dataclasses
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import flamingo_jax as fj
from flamingo_jax.inference import programs, streaming
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.processing.visuals import Visual
from tests.inference.tiny_models import WORDS, make_loaded, make_tokenizer, tiny_config

RNG = np.random.default_rng(0)
IMAGES = [Visual(RNG.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)) for _ in range(4)]
PROMPTS = [
    [IMAGES[n % 4], f"Output: {WORDS[n % 17]} {WORDS[n % 5]}", IMAGES[n % 3], "Output:"]
    for n in range(50)
]
TOKENS = 12


@pytest.fixture(scope="module")
def loaded() -> LoadedFlamingo:
    """Its head is not its embedding, or it would repeat a token for ever, and it likes <EOC>, so
    that answers are of different lengths.
    """
    lm = dataclasses.replace(
        tiny_config(make_tokenizer().vocab_size).language_model, tied_embeddings=False
    )
    made = make_loaded(language_model=lm)
    made.model.extra_embedding[...] *= 2
    made.model.language_model.embedding[...] *= 4
    return made


@pytest.fixture(scope="module")
def model(loaded: LoadedFlamingo) -> fj.Model:
    return fj.Model(loaded.model, loaded.tokenizer)


@pytest.fixture(scope="module")
def greedy(model: fj.Model) -> list[fj.Completion]:
    """Every prompt's answer, one by one."""
    return [model.generate(p, max_tokens=TOKENS, beam_size=1) for p in PROMPTS]


def test_answers_of_few_rows_that_are_given_on_equal_those_one_by_one(
    loaded: LoadedFlamingo, greedy: list[fj.Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 4 rows for 50 prompts, whose answers end at different times."""
    assert len({len(one.tokens) for one in greedy}) > 3
    assert 5 < sum(one.finished for one in greedy) < 45
    read = []
    start = programs.start_rows
    monkeypatch.setattr(
        programs, "start_rows", lambda *a: (read.append(len(a[2].lengths)), start(*a))[1]
    )
    engine = Engine(loaded, batch_size=4)
    counted: list[int] = []
    made = engine.generate(PROMPTS, DecodingConfig(TOKENS), progress=counted.append)
    assert [one.text for one in made] == [one.text for one in greedy]
    assert [one.tokens for one in made] == [one.tokens for one in greedy]
    assert [one.finished for one in made] == [one.finished for one in greedy]
    np.testing.assert_allclose([o.score for o in made], [o.score for o in greedy], atol=1e-4)
    assert sum(counted) == 50 and set(read) == {1}


def test_sampling_depends_on_the_prompts_number_alone(
    model: fj.Model, loaded: LoadedFlamingo
) -> None:
    options = {"max_tokens": TOKENS, "temperature": 1.3, "top_p": 0.9, "seed": 5}
    many = model.generate(PROMPTS[:7], **options)  # type: ignore[call-overload]
    small = Engine(loaded, batch_size=2)
    again = small.generate(PROMPTS[:7], DecodingConfig(TOKENS, temperature=1.3, top_p=0.9), seed=5)
    assert [one.text for one in many] == [one.text for one in again]
    assert len({one.text for one in many}) > 3
    (first,) = model.generate([PROMPTS[0]], **options)  # type: ignore[call-overload]
    assert first.text == many[0].text
    stream = model.stream(PROMPTS[0], **options)
    assert "".join(token.text for token in stream) == first.text


def test_fifty_streams_of_eight_threads_equal_the_prompts_one_by_one(
    model: fj.Model, greedy: list[fj.Completion]
) -> None:
    def read(number: int) -> fj.Completion:
        stream = model.stream(PROMPTS[number], max_tokens=TOKENS)
        tokens = list(stream)
        made = stream.completion
        assert "".join(token.text for token in tokens) == made.text
        assert sum(token.log_probability for token in tokens) == pytest.approx(made.score)
        assert tuple(t.token for t in tokens)[: len(made.tokens)] == made.tokens
        return made

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(read, range(50)))
    assert [one.text for one in made] == [one.text for one in greedy]
    assert [one.finished for one in made] == [one.finished for one in greedy]
    np.testing.assert_allclose([o.score for o in made], [o.score for o in greedy], atol=1e-4)


def test_a_cancelled_stream_leaves_its_row_and_the_others_go_on(
    model: fj.Model, greedy: list[fj.Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "MOST_ROWS", 4)
    long = [n for n in range(50) if not greedy[n].finished]
    kept, waiting = long[:3], long[3]
    # Endless ones fill the pool: only cancelling frees a row.
    endless = model.stream(PROMPTS[long[4]], max_tokens=116)
    streams = [model.stream(PROMPTS[n], max_tokens=TOKENS) for n in kept]
    last = model.stream(PROMPTS[waiting], max_tokens=TOKENS)
    first = next(endless)
    endless.cancel()
    assert list(endless) == []
    assert endless.completion == fj.Completion(
        first.text, first.log_probability, False, (first.token,)
    )
    for stream, number in zip([*streams, last], [*kept, waiting], strict=True):
        assert "".join(token.text for token in stream) == greedy[number].text
    # A stream that nobody holds any more ends by itself, and with it the thread.
    forgotten = model.stream(PROMPTS[long[4]], max_tokens=116)
    next(forgotten)
    del forgotten
    gc.collect()
    end = time.monotonic() + 60
    while any(thread.name == "streams" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_stop_strings_end_streams_and_lists_alike(
    model: fj.Model, greedy: list[fj.Completion]
) -> None:
    whole = max(greedy, key=lambda one: len(one.text))
    number = greedy.index(whole)
    # Some letters in the middle, over the end of a token.
    stop = whole.text[len(whole.text) // 2 : len(whole.text) // 2 + 4]
    made = model.generate(PROMPTS, max_tokens=TOKENS, beam_size=1, stop=["@", stop])
    assert [one.text for one in made] == [one.text.partition(stop)[0] for one in greedy]
    assert made[number].finished and made[number].score > whole.score
    stream = model.stream(PROMPTS[number], max_tokens=TOKENS, stop=stop)
    assert "".join(token.text for token in stream) == made[number].text
    assert stream.completion.tokens == made[number].tokens
    assert stream.completion.score == pytest.approx(made[number].score, abs=1e-4)


def test_mistakes_are_said_at_the_call_and_later_streams_go_on(
    model: fj.Model, greedy: list[fj.Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked, sentence in (
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 20_000}, "20000 are to follow"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"stop": ""}, "stop string ''"),
        ({"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(fj.UserError, match=sentence):
            model.stream(PROMPTS[0], **asked)  # type: ignore[arg-type]
    with pytest.raises(fj.UserError, match="a stream is of one prompt"):
        model.stream(PROMPTS[:2])  # type: ignore[arg-type]
    with pytest.raises(fj.UserError, match="n_best is 4, but a beam of 3"):
        model.generate(PROMPTS[0], n_best=4)
    stream = model.stream(PROMPTS[0], max_tokens=TOKENS)
    with pytest.raises(fj.UserError, match="before its end"):
        _ = stream.completion
    list(stream)
    # What fails on the device is raised by the stream that waits for it.
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(programs, "start_rows", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            next(model.stream(PROMPTS[0]))
    again = model.stream(PROMPTS[1], max_tokens=TOKENS)
    assert "".join(token.text for token in again) == greedy[1].text
