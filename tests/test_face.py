"""What `import flamingo_jax` offers, used as its documentation says."""

import ast
import dataclasses
import inspect
import io
import json
import pathlib
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from PIL import Image as PILImage

import flamingo_jax as fj
from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.inference.decoding import DecodingConfig
from flamingo_jax.inference.engine import Engine
from flamingo_jax.inference.loading import LoadedFlamingo
from flamingo_jax.inference.prompts import Prompt
from flamingo_jax.processing import images
from flamingo_jax.processing.visuals import Visual
from flamingo_jax.pytrees import to_flat
from flamingo_jax.tasks.flamingo import FlamingoTask
from tests.inference.tiny_models import make_export, make_tokenizer, tiny_config
from tests.interop import cases
from tests.processes import one_device

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = make_tokenizer()
PAPER_DECODING = DecodingConfig(32, beam_size=3)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
FRAMES = RNG.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with all that README's lines name."""
    root = tmp_path_factory.mktemp("place")
    make_export(root / "runs/quickstart/flamingo/export")
    qwen = cases.write_folder(root / "models/Qwen3-0.6B", *cases.fixture("qwen3"))
    TOKENIZER.save(qwen)
    (root / "a.png").write_bytes(png(PIXELS))
    (root / "b.png").write_bytes(png(FRAMES[0]))
    (root / "text.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def model(place: pathlib.Path) -> fj.Model:
    return fj.load(place / "runs/quickstart/flamingo/export")


def test_readmes_lines_run_as_they_are_written(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    names = _run_lines("README.md", blocks=2)
    tokens = 1 + 1 + len(TOKENIZER.encode(" A cat."))  # <BOS> and <image> before them.
    assert names["logits"].shape == (1, tokens, TOKENIZER.vocab_size + 1)
    assert isinstance(names["flamingo"], fj.Flamingo)
    assert isinstance(names["lm"], fj.LanguageModel)
    assert names["tokenizer"].decode(names["tokenizer"].encode(" a star")) == " a star"
    assert " a red square" in capsys.readouterr().out


def test_the_rooms_lines_run_as_they_are_written(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    names = _run_lines("flamingo_jax/inference/README.md")
    assert len(names["answers"]) == 2
    assert names["ranking"].best in (" a red heart", " a blue star")
    assert names["similar"].shape[0] == 2


def _run_lines(document: str, blocks: int = 1) -> dict[str, Any]:
    """The names that a document's first blocks of Python leave behind."""
    text = (ROOT / document).read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:blocks]
    assert len(found) == blocks and found[0].startswith("import flamingo_jax as fj\n")
    names: dict[str, Any] = {}
    for lines in found:
        exec(lines, names)  # noqa: S102 - the documentation's own code
    return names


def test_the_import_costs_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, time; began = time.process_time(); import flamingo_jax as fj;"
        "seconds = time.process_time() - began; heavy = {'jax', 'numpy', 'PIL'} & set(sys.modules);"
        "fj.FlamingoConfig; import json;"
        "print(json.dumps([seconds, sorted(heavy), 'jax' in sys.modules, dir(fj)]))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=one_device(), capture_output=True, text=True
    )
    seconds, heavy, jax_for_a_config, listed = json.loads(made.stdout)
    assert seconds < 0.05
    assert not heavy
    assert not jax_for_a_config
    assert set(fj.__all__) <= set(listed)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        fj.lod  # noqa: B018


def test_editors_see_what_users_get() -> None:
    tree = ast.parse((ROOT / "flamingo_jax/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(fj.__all__)
    for name, module in seen.items():
        assert getattr(fj, name) is getattr(sys.modules[str(module)], name)


def _parts(config: type) -> set[type]:
    """The dataclasses that a config is made of."""
    found = {config}
    for hint in typing.get_type_hints(config).values():
        for kind in (hint, *typing.get_args(hint)):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found |= _parts(kind)
    return found


def test_every_config_of_a_flamingo_is_public() -> None:
    assert {part.__name__ for part in _parts(fj.FlamingoConfig)} <= set(fj.__all__)


def test_every_public_name_is_documented() -> None:
    for name in fj.__all__:
        value = getattr(fj, name)
        if not callable(value):
            continue
        assert value.__doc__, name
        if not inspect.isclass(value):
            assert "Raises:" in value.__doc__, f"{name} does not say what goes wrong"
            continue
        for attribute, member in vars(value).items():
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "func", function)  # A cached property.
            function = getattr(function, "__func__", function)
            if attribute.startswith("_") or not inspect.isfunction(function):
                continue
            assert function.__doc__, f"{name}.{attribute} has no docstring"


def _engine(model: fj.Model) -> Engine:
    return Engine(LoadedFlamingo(model.flamingo, model.tokenizer, model.config))


def _pixels(model: fj.Model) -> np.ndarray:
    return images.load(png(PIXELS), 32, model.config.vision.mean)[None]


def test_answers_are_the_engines(model: fj.Model) -> None:
    visual = Visual(_pixels(model))
    plain: list[Prompt] = [[visual, "Output:"], ["Output: a star", visual, "Output:"]]
    prompts = [
        [fj.Image(PIXELS), "Output:"],
        ["Output: a star", fj.Image(png(PIXELS)), "Output:"],
    ]
    engine = _engine(model)
    # One prompt and the defaults, as in README's lines, which have compiled this already.
    assert model.generate(prompts[0]) == engine.generate(plain[:1], PAPER_DECODING)[0]
    greedy = engine.generate(plain, DecodingConfig(6))
    assert model.generate(prompts, max_tokens=6, beam_size=1) == greedy
    texts = [["<image>Output:"], ["Output: a star", "<image>", "Output:"]]
    pixels = [fj.Image(PIXELS), PIXELS]
    assert model.generate(texts, images=pixels, max_tokens=6, beam_size=1) == greedy
    for one in greedy:
        assert one.text == model.tokenizer.decode(one.tokens)


def test_scores_are_the_engines(model: fj.Model) -> None:
    visual = Visual(_pixels(model))
    candidates = [" a red heart", " a blue star"]
    (found,) = _engine(model).log_likelihoods([[visual, "Output:"]], [candidates])
    score = model.score([fj.Image(PIXELS), "Output:"], candidates)
    assert score.candidates == tuple(candidates)
    assert score.log_likelihoods == tuple(found)
    assert score.best == candidates[int(found.argmax())]
    share = np.exp(found) / np.exp(found).sum()
    np.testing.assert_allclose(score.probabilities, share, rtol=1e-6)
    prompts = [[fj.Image(PIXELS), "Output:"], [fj.Image(PIXELS), "Output:"]]
    each = model.score(prompts, [candidates[:1], candidates[1:]])
    assert [one.candidates for one in each] == [(" a red heart",), (" a blue star",)]
    together = [one.log_likelihoods[0] for one in each]
    np.testing.assert_allclose(together, found, rtol=1e-5)
    assert model.score(prompts, candidates)[1].log_likelihoods == pytest.approx(list(found))


def test_logits_are_those_that_score_a_candidate(model: fj.Model) -> None:
    candidate = " a red circle"
    prompts = [["<image>", candidate], ["this is a", "<image>Output:", candidate]]
    logits = model(prompts, images=[PIXELS, FRAMES[0]])
    tokens = model.tokenise(prompts, images=[PIXELS, FRAMES[0]])
    assert logits.shape[:2] == (2, max(len(one.tokens) for one in tokens))
    ends = len(model.tokenizer.encode(candidate))
    log_probabilities = jax.nn.log_softmax(logits)
    scores = model.score(
        [parts[:-1] for parts in prompts], [candidate], images=[PIXELS, FRAMES[0]], close=False
    )
    for row, (one, score) in enumerate(zip(tokens, scores, strict=True)):
        last = range(len(one.tokens) - ends, len(one.tokens))
        total = sum(float(log_probabilities[row, t - 1, one.tokens[t]]) for t in last)
        assert score.log_likelihoods[0] == pytest.approx(total, abs=1e-4)
    assert not np.asarray(logits[0, len(tokens[0].tokens) :]).any()


def test_the_loss_of_a_batch_is_what_score_says(model: fj.Model) -> None:
    prompts = [[fj.Image(PIXELS), "Output:"], ["this is a", fj.Video(FRAMES), "Output:"]]
    answers = [" a red circle", " a star"]
    batch = model.batch(prompts, answers)
    assert batch["images"].shape == (2, 4, 32, 32, 3)
    graph, state = nnx.split(model.flamingo)
    losses = jax.jit(
        lambda state: FlamingoTask().losses(nnx.merge(graph, state), {"own": batch}, None)
    )(state)
    wanted = [
        model.score(prompt, [answer]).log_likelihoods[0]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert float(losses["own"].total) == pytest.approx(-sum(wanted), abs=1e-3)
    assert "images" not in model.batch(["Output:"], [" a star"])
    with pytest.raises(fj.UserError, match="2 prompts and 1 answers"):
        model.batch(prompts, answers[:1])


def test_a_saved_model_is_loaded_as_it_was(model: fj.Model, tmp_path: pathlib.Path) -> None:
    model.save(tmp_path / "export")
    again = fj.load(tmp_path / "export")
    assert again.config == model.config
    for name, value in to_flat(nnx.split(again.flamingo)[1]).items():
        np.testing.assert_array_equal(value, to_flat(nnx.split(model.flamingo)[1])[name])
    with pytest.raises(fj.UserError, match="is there already"):
        model.save(tmp_path / "export")


def test_parts_of_exports_are_loaded_alone(place: pathlib.Path, model: fj.Model) -> None:
    folder = place / "runs/quickstart/flamingo/export"
    lm, tokenizer = fj.load_language_model(folder)
    assert tokenizer is not None
    ids = np.array([tokenizer.encode(" a red circle")])
    positions = np.arange(ids.shape[1])[None]
    wanted = model.flamingo.language_model(ids, positions, np.ones_like(ids))
    np.testing.assert_array_equal(lm(ids, positions, np.ones_like(ids)), wanted)

    encoder = fj.load_vision_encoder(folder)
    pooled = np.asarray(encoder([fj.Image(PIXELS), place / "a.png"])).mean((1, 2))
    features = model.features([place / "a.png"])
    np.testing.assert_allclose(
        pooled / np.linalg.norm(pooled, axis=1, keepdims=True), features.repeat(2, 0), atol=1e-5
    )
    with pytest.raises(fj.UserError, match="holds a contrastive export, which has no language"):
        fj.load_language_model(_contrastive(place))


def _contrastive(place: pathlib.Path) -> pathlib.Path:
    folder = place / "contrastive"
    if not folder.exists():
        export_model(folder, kind="contrastive", config={}, parameters={"a": np.zeros(2)})
    return folder


def test_an_image_is_the_same_from_wherever_it_comes(place: pathlib.Path) -> None:
    for fit in ("pad", "crop", "stretch"):
        vision = fj.VisionConfig(image_size=24, image_fit=typing.cast(Any, fit))
        wanted = images.load(png(PIXELS), 24, vision.mean, vision.image_fit)
        sources = [place / "a.png", str(place / "a.png"), png(PIXELS), PIXELS]
        for source in (*sources, PILImage.fromarray(PIXELS), jax.numpy.asarray(PIXELS)):
            np.testing.assert_array_equal(fj.Image(source).visual(vision, 8).frames[0], wanted)


def test_an_image_is_turned_as_it_was_held_and_made_rgb() -> None:
    vision = fj.VisionConfig(image_size=32)
    turned = PILImage.fromarray(PIXELS.transpose(1, 0, 2)[::-1])
    turned.getexif()[0x0112] = 6
    np.testing.assert_array_equal(
        fj.Image(turned).visual(vision, 8).frames, fj.Image(PIXELS).visual(vision, 8).frames
    )
    grey = fj.Image(PIXELS[..., 0]).visual(vision, 8).frames
    np.testing.assert_array_equal(
        grey, fj.Image(np.repeat(PIXELS[..., :1], 3, 2)).visual(vision, 8).frames
    )
    clear = np.concatenate([PIXELS, np.zeros_like(PIXELS[..., :1])], -1)
    np.testing.assert_array_equal(
        fj.Image(clear).visual(vision, 8).frames,
        fj.Image(np.full_like(PIXELS, 255)).visual(vision, 8).frames,
    )


def test_a_video_is_the_same_from_a_file_its_bytes_and_its_frames(tmp_path: pathlib.Path) -> None:
    colours = [np.full((32, 32, 3), 60 * n, np.uint8) for n in range(4)]
    first, *others = (PILImage.fromarray(frame) for frame in colours)
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others, duration=1000)
    vision = fj.VisionConfig(image_size=16)
    wanted = fj.Video(np.stack(colours)).visual(vision, 8).frames
    assert wanted.shape == (4, 16, 16, 3)
    for source in (tmp_path / "clip.gif", (tmp_path / "clip.gif").read_bytes(), colours):
        found = fj.Video(source).visual(vision, 8).frames
        np.testing.assert_allclose(found.astype(int), wanted, atol=2)
    middle = fj.Video(np.stack(colours), frames=2).visual(vision, 8).frames
    np.testing.assert_array_equal(middle, wanted[1:3])
    assert len(fj.Video(tmp_path / "clip.gif", fps=2).visual(vision, 30).frames) == 8
    assert len(fj.Video(tmp_path / "clip.gif").visual(vision, 3).frames) == 3


def _of_vocabulary(size: int) -> fj.Flamingo:
    return nnx.eval_shape(lambda: fj.Flamingo(tiny_config(size), rngs=nnx.Rngs(0)))


MISTAKES: dict[str, tuple[str, Callable[[fj.Model, pathlib.Path], Any]]] = {
    "text named png": (
        "text.png: unreadable image .*its format is not known",
        lambda model, place: fj.Image(place / "text.png"),
    ),
    "no file": ("c.png is not there: name a file", lambda model, place: fj.Image(place / "c.png")),
    "a folder": ("is a folder: name a file", lambda model, place: fj.Video(place)),
    "text as video": (
        "text.png is not a readable video .*give a whole video file",
        lambda model, place: fj.Video(place / "text.png"),
    ),
    "bytes as video": (
        "the bytes of a video cannot be read",
        lambda model, place: fj.Video(b"no video"),
    ),
    "floats": (
        "array of float32, but pixels are uint8 in 0..255: give floats in 0..1 as",
        lambda model, place: fj.Image(np.zeros((4, 4, 3), np.float32)),
    ),
    "channels first": (
        r"shape \[3, 20, 30\].* move the channels last",
        lambda model, place: fj.Image(PIXELS.transpose(2, 0, 1)),
    ),
    "a batch as an image": (
        r"shape \[1, 20, 30, 3\], but pixels are \[H, W, 3\]",
        lambda model, place: fj.Image(PIXELS[None]),
    ),
    "too many pixels": (
        "9000 x 9000 pixels are more than 64000000",
        lambda model, place: fj.Image(np.broadcast_to(PIXELS[0, 0], (9000, 9000, 3))),
    ),
    "no frames": ("was given no frames", lambda model, place: fj.Video([])),
    "frames with fps": (
        "frames have no clock",
        lambda model, place: fj.Video(FRAMES, fps=2.0),
    ),
    "unknown part": (
        "a part of a prompt is a ndarray, but must be a text, fj.Image or fj.Video",
        lambda model, place: model.generate([PIXELS, "Output:"]),
    ),
    "empty": ("a prompt is empty", lambda model, place: model.generate([])),
    "mixed": (
        "a part beside whole prompts",
        lambda model, place: model.generate([["Output:"], "Output:"]),
    ),
    "more tags": (
        "more image tags than",
        lambda model, place: model.generate(["<image><image>", fj.Image(PIXELS)]),
    ),
    "fewer images": (
        "images= has 1 images, but the prompts have 2 <image> tags",
        lambda model, place: model(["<image>", "<image>"], images=[PIXELS]),
    ),
    "images twice": (
        "prompts hold images, and images= gives more",
        lambda model, place: model([fj.Image(PIXELS)], images=[PIXELS]),
    ),
    "too many images": (
        "600 images and videos, but 512 are the most",
        lambda model, place: model.generate([fj.Image(PIXELS)] * 600),
    ),
    "too long": (
        "tokens, and 32 are to follow, but 16384 are the most",
        lambda model, place: model.generate([" a red circle" * 8000]),
    ),
    "no candidates": (
        "there are no candidates",
        lambda model, place: model.score(["Output:"], []),
    ),
    "a wrong candidate": (
        "a candidate is a int, but must be a text",
        lambda model, place: model.score(["Output:"], typing.cast(Any, [1])),
    ),
    "not unicode": (
        "is no Unicode",
        lambda model, place: model.generate(["\ud800"]),
    ),
    "no tokens": (
        "max_tokens is 0: it must be 1 or more",
        lambda model, place: model.generate(["Output:"], max_tokens=0),
    ),
    "top_p": (
        "top_p is 0.0: it must be above 0",
        lambda model, place: model.generate(["Output:"], top_p=0.0),
    ),
    "a beam that samples": (
        "a beam of 3 does not sample",
        lambda model, place: model.generate(["Output:"], beam_size=3, temperature=1.0),
    ),
    "another tokenizer": (
        r"the tokenizer has \d+ ids and the language model 20: give the one",
        lambda model, place: fj.Model(_of_vocabulary(20), TOKENIZER),
    ),
    "a mesh": (
        "the mesh has the axes data, but a model is laid out over data, fsdp, model",
        lambda model, place: fj.load(
            place / "runs/quickstart/flamingo/export",
            mesh=Mesh(np.array(jax.devices()[:2]), ("data",)),
        ),
    ),
    "no export": ("is no folder", lambda model, place: fj.load(place / "nothing")),
    "another export": ("contrastive export", lambda model, place: fj.load(_contrastive(place))),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_sentence(case: str, model: fj.Model, place: pathlib.Path) -> None:
    said, make = MISTAKES[case]
    with pytest.raises(fj.UserError, match=said) as error:
        make(model, place)
    assert "\n" not in str(error.value)
