"""The examples and the notebook, run on small folders."""

import json
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import flamingo_jax as fj
from flamingo_jax.pytrees import to_flat
from launch.examples import caption, evaluate, finetune
from tests.inference.tiny_models import make_export

EXAMPLES = pathlib.Path(caption.__file__).parent
CAPTIONS = ("a red circle", "a blue square", "a green star")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("model") / "runs/quickstart/flamingo/export"
    make_export(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Images of three colours, each with its caption."""
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for number in range(9):
        colour = np.zeros((20, 30, 3), np.uint8)
        colour[..., number % 3] = 200 + number
        Image.fromarray(colour).save(folder / f"{number}.png")
        lines.append({"image": f"{number}.png", "captions": [CAPTIONS[number % 3]]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(main: object, arguments: Sequence[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["example", *map(str, arguments)])
    main()  # type: ignore[operator]


def test_every_image_of_a_folder_is_captioned(
    model: pathlib.Path,
    images: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(caption.main, [images, f"--model={model}", "--batch_size=4"], monkeypatch)
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == [str(images / f"{number}.png") for number in range(9)]
    alone = fj.load(model).generate([fj.Image(images / "8.png"), "Output:"])
    assert said[str(images / "8.png")] == alone.text.strip()
    with pytest.raises(fj.UserError, match="holds no images"):
        run(caption.main, [model, f"--model={model}"], monkeypatch)


def test_fine_tuning_learns_the_captions_and_evaluation_sees_it(
    model: pathlib.Path,
    images: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuned = tmp_path / "tuned"
    options = [f"--model={model}", f"--output={tuned}", "--steps=60", "--learning_rate=0.01"]
    run(finetune.main, [images, *options, "--batch_size=4"], monkeypatch)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] / 4

    run(evaluate.main, [images, f"--model={tuned}", "--shots", "0", "2"], monkeypatch)
    zero, _ = capsys.readouterr().out.splitlines()[1:]
    right, control = (float(share) for share in re.findall(r"([\d.]+)%", zero))
    assert right == 100.0 and control < 100.0

    before = to_flat(nnx.split(fj.load(model).flamingo)[1])
    after = to_flat(nnx.split(fj.load(tuned).flamingo)[1])
    changed = {n.split("/")[0] for n in before if not np.array_equal(before[n], after[n])}
    assert changed == {"resampler", "visual_projection", "gated_xattn", "extra_embedding"}


def test_a_wrong_line_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png"}')
    with pytest.raises(fj.UserError, match=r"captions.jsonl, line 1: write"):
        run(evaluate.main, [tmp_path], monkeypatch)


def test_the_notebook_runs_from_top_to_bottom(
    model: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert sum(len(cell.splitlines()) for cell in cells) < 100
    monkeypatch.chdir(model.parents[3])
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile(cell, "cell", "exec"), names)  # noqa: S102 - the notebook's own code
    losses = names["losses"]
    assert isinstance(losses, list) and losses[-1] < losses[0]
    assert "CandidateScores" in capsys.readouterr().out


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path.name
