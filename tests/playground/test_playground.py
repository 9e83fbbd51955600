"""What the page does, without a browser: edits, uploads, examples, answers, heat maps."""

import dataclasses
import json
import pathlib
import re
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flamingo_jax as fj
from flamingo_jax.inference.attention_maps import AttentionMaps, TokenProbability
from flamingo_jax.playground import fragments
from flamingo_jax.playground.examples import dataset_examples, prompt_examples
from flamingo_jax.playground.heat_map import overlay
from flamingo_jax.playground.playground import BEAM, SAMPLING, DecodingChoice, Playground, choice_of
from flamingo_jax.playground.session import Example, Session
from flamingo_jax.playground.uploads import UploadLimits, read_upload
from flamingo_jax.processing.visuals import Visual
from tests.inference.tiny_models import make_loaded, tiny_config

CONFIG = tiny_config(90)
RNG = np.random.default_rng(0)
IMAGES = [Visual(RNG.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)) for _ in range(3)]
CLIP = Visual(RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
EXAMPLES = [Example((image, "Output:"), f" shape {n}") for n, image in enumerate(IMAGES)]
TEXTS = [" a", " <red>", " star"]


class FakeModel:
    """Answers every prompt with TEXTS, and looks where it is told; a prompt of "long" is too long.

    streams: the streams that were made. step: called before each token.
    """

    config = CONFIG
    tokenizer = types.SimpleNamespace(eoc=90)

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.asked: list[Any] = []
        self.step: Any = lambda: None

    def stream(self, prompt: Any, **options: Any) -> Any:
        self._read(prompt, options)
        model = self

        class Stream:
            cancelled = False

            def __init__(self) -> None:
                self.completion = types.SimpleNamespace(finished=True, tokens=[])

            def cancel(self) -> None:
                self.cancelled = True

            def __iter__(self) -> Any:
                for number, text in enumerate(TEXTS):
                    model.step()
                    if self.cancelled:
                        return
                    self.completion.tokens.append(number)
                    yield types.SimpleNamespace(text=text, token=number, log_probability=-0.1)
                self.completion.tokens.append(90)
                yield types.SimpleNamespace(text="", token=90, log_probability=-0.1)

        self.streams.append(Stream())
        return self.streams[-1]

    def generate(self, prompt: Any, **options: Any) -> Any:
        self._read(prompt, options)
        return types.SimpleNamespace(tokens=(0, 1, 2), finished=True)

    def attention_maps(self, prompt: Any, ids: Any) -> AttentionMaps:
        visuals = tuple(part for part in prompt if isinstance(part, Visual))
        return some_maps(visuals, len(ids))

    def _read(self, prompt: Any, options: Any) -> None:
        if "long" in prompt:
            raise fj.UserError("a prompt has 9 tokens: shorten it")
        self.asked.append((prompt, options))


def some_maps(visuals: tuple[Visual, ...], count: int) -> AttentionMaps:
    """Maps of `count` tokens; in block 1 all look at the last visual's first cell."""
    tokens = tuple(TokenProbability(TEXTS[n], n, -0.1 * n) for n in range(count))
    others = (TokenProbability(" a", 0, -0.1), TokenProbability("<EOC>", 90, -3.0))
    weights = np.zeros((2, count, len(visuals), 2), np.float32)
    grids = []
    for visual in visuals:
        grid = np.zeros((2, len(visual.frames), 2, 2), np.float32)
        grid[0, 0, 0, 0] = 1.0
        grid[1] = 1 / grid[1].size
        grids.append(grid)
    if visuals:
        weights[0, :, -1, 0] = weights[1, :, -1, 1] = 1.0
    phi = np.full(count, len(visuals) - 1)
    return AttentionMaps(tokens, (others,) * count, phi, visuals, weights, tuple(grids))


@pytest.fixture
def playground(tmp_path: pathlib.Path) -> Playground:
    model: Any = FakeModel()
    return Playground(model, EXAMPLES, tmp_path)


def test_a_prompt_is_put_together_and_read_in_order(playground: Playground) -> None:
    session = playground.start()
    assert session.parts == [IMAGES[0], "Output:"]
    playground.edit(session, "shot", {"index": "2"})
    playground.edit(session, "shot", {"index": 1})
    assert session.prompt(EXAMPLES) == [
        IMAGES[2], "Output: shape 2", IMAGES[1], "Output: shape 1", IMAGES[0], "Output:"
    ]  # fmt: skip
    playground.edit(session, "shot", {"index": 2})
    playground.edit(session, "ask", {"index": 1})
    assert session.prompt(EXAMPLES) == [IMAGES[1], "Output:"]
    playground.edit(session, "text", {})
    session.write({2: "more", 0: "no text there", 9: "nor there"})
    playground.edit(session, "up", {"index": 2})
    playground.edit(session, "down", {"index": 0})
    assert session.prompt(EXAMPLES) == ["more", IMAGES[1], "Output:"]
    playground.edit(session, "remove", {"index": 1})
    assert session.prompt(EXAMPLES) == ["more", "Output:"]
    playground.edit(session, "shots", {"index": 2})
    assert len(session.shots) == 2 and session.asked not in session.shots
    playground.edit(session, "clear", {})
    with pytest.raises(fj.UserError, match="the prompt is empty"):
        session.prompt(EXAMPLES)


@pytest.mark.parametrize(
    "data", [{}, {"index": "a"}, {"index": None}, {"index": 1e999}, {"index": -5}]
)
def test_what_a_page_sends_is_not_trusted(playground: Playground, data: Any) -> None:
    session = playground.start()
    for what in ("up", "down", "remove", "ask", "shot", "upload", "nonsense"):
        assert "fj-error" not in playground.edit(session, what, data)
    assert session.parts == [IMAGES[0], "Output:"] and not session.shots
    assert "no answer" in playground.look(session, data).status


def test_a_prompt_is_bounded(playground: Playground) -> None:
    session = Session()
    for _ in range(63):
        session.add("")
    assert "at most 64 texts, images and clips" in playground.edit(session, "text", {})
    with pytest.raises(fj.UserError, match="100,001 characters, but 100,000 are the most"):
        session.write({0: "x" * 100_001})


def test_an_answer_grows_and_ends_with_what_it_looked_at(playground: Playground) -> None:
    session = playground.start()
    views = list(playground.answer(session, DecodingChoice(max_tokens=7)))
    grown = [len(re.findall("fj-token", view.answer or "")) for view in views]
    assert grown == [0, 1, 2, 3, 3, 3]
    assert all('data-done="0"' in str(view.answer) for view in views[:-1])
    assert 'data-done="1"' in str(views[-1].answer) and "ended by itself" in views[-1].status
    assert " &lt;red&gt;" in str(views[-1].answer) and "<red>" not in str(views[-1].answer)
    assert "The example says: <b>shape 0</b>" in str(views[-1].answer)
    assert "image 1 of 1 (phi)" in str(views[-1].look)
    model: Any = playground.model
    ((prompt, options),) = model.asked
    assert prompt == [IMAGES[0], "Output:"]
    assert options["max_tokens"] == 7 and options["temperature"] == 0.0 and options["top_p"] == 1.0
    view = playground.look(session, {"index": "2"})
    assert "␣star" in str(view.look) and 'data-token="2"' in str(view.look)
    assert view.status is None  # The line stays, which says how the answer came about.
    view = playground.look(session, {"block": "1"})
    assert session.block == 0 and "brightest of 4 cells: 100 %" in str(view.look)
    view = playground.look(session, {"block": "2"})
    assert "brightest of 4 cells: 25 %" in str(view.look)
    assert playground.look(session, {"block": "7"}) and session.block is None


def test_options_reach_the_model(playground: Playground) -> None:
    session, model = playground.start(), playground.model
    choice = choice_of(SAMPLING, 5, 0.7, 0.8, 3, "\n.\n")
    assert choice == DecodingChoice(SAMPLING, 5, 0.7, 0.8, 3, (".",))
    list(playground.answer(session, choice))
    list(playground.answer(session, dataclasses.replace(choice, kind=BEAM)))
    asked: Any = model
    assert [options for _, options in asked.asked] == [
        {"max_tokens": 5, "temperature": 0.7, "top_p": 0.8, "stop": (".",), "seed": 3},
        {"max_tokens": 5, "beam_size": 3},
    ]
    for wrong in (None, "5", float("nan")):
        with pytest.raises(fj.UserError, match="is not a number"):
            choice_of(SAMPLING, wrong, 0.7, 0.8, 3, "")  # type: ignore[arg-type]


def test_an_answer_is_stopped_where_it_is(playground: Playground) -> None:
    session, model = playground.start(), playground.model
    fake: Any = model
    assert "nothing is being written" in playground.stop(session)
    views = playground.answer(session, DecodingChoice())
    next(views), next(views)
    refused = list(playground.answer(session, DecodingChoice()))
    assert len(refused) == 1 and "an answer is being written" in refused[0].status
    assert "stopping" in playground.stop(session)
    *_, last = views
    assert "stopped by you" in last.status and fake.streams[0].cancelled
    assert len(re.findall("fj-token", str(last.answer))) == 1 and not session.running
    # A visitor who leaves frees the model.
    views = playground.answer(session, DecodingChoice())
    next(views), next(views)
    views.close()
    assert fake.streams[1].cancelled and not session.running


def test_a_mistake_is_one_sentence_and_the_next_answer_comes(playground: Playground) -> None:
    session = playground.start()
    session.parts = ["long"]
    *_, last = playground.answer(session, DecodingChoice())
    assert re.search(r'role="alert">a prompt has 9 tokens: shorten it<', last.status)
    session.parts = ["short"]
    *_, last = playground.answer(session, DecodingChoice())
    assert "attends to no image" in str(last.look)


def test_only_the_visual_that_phi_names_is_marked() -> None:
    html = fragments.look(some_maps((IMAGES[0], CLIP), 2), 1, None)
    assert "reads clip 2 of 2 (phi)" in html
    assert re.findall(r"frame (\d): (\d+) %", html) == [("1", "67"), ("2", "17"), ("3", "17")]
    assert re.findall(r"<figcaption>(\d): (\d+) %", html) == [("1", "0"), ("2", "100")]
    assert "end of the answer" in html


def test_the_heat_is_where_it_was_and_nowhere_else() -> None:
    frame = np.full((32, 32, 3), 128, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[1, 2] = 0.5
    drawn = overlay(frame, heat, 0.5, 128).astype(int)
    coloured = np.abs(drawn - 128).max(-1)
    assert coloured[48, 80] > 60  # The centre of row 1, column 2, of cells of 32 pixels.
    assert not coloured[:, :16].any() and not coloured[112:].any()
    np.testing.assert_array_equal(overlay(frame, 0 * heat, 0.0, 32), frame)


def test_an_upload_is_known_by_its_content(tmp_path: pathlib.Path) -> None:
    limits = UploadLimits(megabytes=1, seconds=5)

    def read(name: str) -> Visual:
        return read_upload(tmp_path / name, tmp_path, CONFIG, limits)

    image = Image.fromarray(RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    wanted = fj.Image(tmp_path / "a.png").visual(CONFIG.vision, 4).frames
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    np.testing.assert_array_equal(read("a.mp4").frames, wanted)
    assert not (tmp_path / "a.mp4").exists()
    frames = [Image.fromarray(np.full((32, 32, 3), 60 * n, np.uint8)) for n in range(4)]
    for seconds in (1, 3):
        options: Any = {"append_images": frames[1:], "duration": 1000 * seconds}
        frames[0].save(tmp_path / "b.png", "GIF", save_all=True, **options)
        assert read("b.png").frames.shape == (4, 32, 32, 3)
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (12_500, 8_000)).save(tmp_path / "large.png")
    (tmp_path / "big.png").write_bytes(bytes((1 << 20) + 1))
    for name, said in {
        "text.png": "text.png is neither an image nor a clip that can be read",
        "large.png": "large.png: 12500 x 8000 pixels are more than 64000000",
        "big.png": "big.png has 1.0 MB, but 1 are the most",
        "../other.png": "the uploaded file is no longer there",
        "/etc/passwd": "the uploaded file is no longer there",
    }.items():
        with pytest.raises(fj.UserError, match=re.escape(said)) as error:
            read(name)
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_long_clip_is_refused_by_its_header(tmp_path: pathlib.Path) -> None:
    import av

    with av.open(str(tmp_path / "long.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 32
        for _ in range(9):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    with pytest.raises(fj.UserError, match="long.mp4 lasts 9 s, but 5 are the most: cut it"):
        read_upload(tmp_path / "long.mp4", tmp_path, CONFIG, UploadLimits(seconds=5))


def test_uploads_are_added_and_each_mistake_is_told(playground: Playground) -> None:
    session = Session()
    Image.fromarray(IMAGES[0].frames[0]).save(playground.folder / "a.png")
    (playground.folder / "b.png").write_text("no image")
    paths = [str(playground.folder / name) for name in ("a.png", "b.png")]
    said = playground.edit(session, "upload", {"paths": paths, "refused": ["<c>.mp4"]})
    assert "&lt;c&gt;.mp4 was not taken, since files have at most 32 MB" in said
    assert "b.png is neither" in said
    assert [type(part) for part in session.parts] == [Visual, str]


class FakeDatasets:
    """A dataset of each kind."""

    def kind(self, path: str) -> str:
        return path

    def splits(self, path: str) -> list[str]:
        return ["train", "test"]

    def records(self, path: str, split: str, kind: str) -> list[Any]:
        encoded = _png(IMAGES[0].frames[0])
        assert split == ("train" if path == "videos" else "test")
        return [
            {
                "id": b"1",
                "image": encoded,
                "images": [encoded, encoded],
                "frames": [encoded] * 3,
                "captions": [b"a star"],
                "question": b"what?",
                "answers": [b"a star"],
                "type": b"",
                "texts": [b"", b" this is a dax", b" this is a wug"],
            }
        ] * 5


def _png(pixels: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("path", "texts", "answer", "frames"),
    [
        ("pairs", ["Output:"], " a star", [1]),
        ("videos:train", ["Output:"], " a star", [3]),
        ("questions", ["Question: what? Answer:"], " a star", [3]),
        ("pages", [" this is a dax", " this is a"], " wug", [1, 1]),
    ],
)
def test_examples_come_from_datasets(path: str, texts: Any, answer: str, frames: Any) -> None:
    found = dataset_examples(FakeDatasets(), path, CONFIG, 3, 0)
    assert len(found) == 3
    assert [part for part in found[0].parts if isinstance(part, str)] == texts
    visuals = [part for part in found[0].parts if isinstance(part, Visual)]
    assert [len(visual.frames) for visual in visuals] == frames
    assert found[0].answer == answer and found[0].shot[-1] == texts[-1] + answer
    with pytest.raises(fj.UserError, match="holds text alone"):
        dataset_examples(FakeDatasets(), "text", CONFIG, 3, 0)


def test_examples_come_from_prompt_files(tmp_path: pathlib.Path) -> None:
    from launch.prompt_files import prompt_of, read_prompts

    (tmp_path / "a.png").write_bytes(_png(IMAGES[0].frames[0]))
    lines = [[{"image": "a.png"}, {"text": "Output:"}], [{"text": "more"}]]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = read_prompts(tmp_path / "p.jsonl", "--examples")
    prompts = [prompt_of(parts, tmp_path, fps=1.0, frames=None) for parts in read]
    first, second = prompt_examples(prompts, CONFIG, 5)
    assert isinstance(first.parts[0], Visual) and first.parts[1] == "Output:"
    assert second.shot == ["more"] and "more" in fragments.gallery(Session(), [first, second])


@pytest.mark.scale
def test_fifty_prompts_from_eight_threads_are_answered_as_each_alone(
    tmp_path: pathlib.Path,
) -> None:
    loaded = make_loaded()
    model = fj.Model(loaded.model, loaded.tokenizer)
    playground = Playground(model, EXAMPLES, tmp_path)
    words = ("a red circle", "this is a", "Output:", "", "Question: what colour is this? Answer:")
    prompts = [[IMAGES[n % 3], words[n % 5]] if n % 10 != 9 else [""] for n in range(50)]

    def run(parts: list[Any]) -> tuple[str, tuple[int, ...]]:
        session = Session(parts=list(parts))
        *_, last = playground.answer(session, DecodingChoice(max_tokens=6))
        tokens = session.maps.tokens if session.maps is not None else ()
        return last.status, tuple(token.token for token in tokens)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, prompts))
    for parts, (status, tokens) in zip(prompts, found, strict=True):
        if parts == [""]:
            assert "the prompt is empty" in status and not tokens
            continue
        alone = model.generate(
            [part for part in parts if not isinstance(part, str) or part], max_tokens=6, beam_size=1
        )
        assert tokens == alone.tokens, status
