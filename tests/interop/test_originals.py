"""Beside transformers' own modules, where they are installed (flamingo_jax[interop-test]), and
the speed and memory of loading: long proofs.
"""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flamingo_jax.errors import UserError
from flamingo_jax.interop import verify
from flamingo_jax.interop.load import load_vision_encoder
from tests.interop import cases, make_fixtures
from tests.interop.test_families import BAR
from tests.launch import commands
from tests.processing.test_images import soft_waves

ROOT = pathlib.Path(__file__).parents[2]


def convert(monkeypatch: pytest.MonkeyPatch, **given: object) -> int:
    command = commands.load("convert")
    for name in ("LANGUAGE_MODEL", "VISION_ENCODER", "OUTPUT", "VERIFY"):
        monkeypatch.setattr(
            command, name, commands.flag(given.get(name, "" if name != "VERIFY" else False))
        )
    return command.main()


def test_bad_calls_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**given: object) -> str:
        with pytest.raises(UserError) as caught:
            convert(monkeypatch, **given)
        return str(caught.value)

    folder = str(cases.write_folder(tmp_path / "lm", *cases.fixture("llama")))
    assert "name the folder of one model" in refused(OUTPUT="out")
    assert "name the folder of one model" in refused(
        LANGUAGE_MODEL=folder, VISION_ENCODER=folder, OUTPUT="out"
    )
    assert "nothing to do" in refused(LANGUAGE_MODEL=folder)
    assert "is no folder" in refused(LANGUAGE_MODEL="nowhere", OUTPUT=str(tmp_path / "out"))
    assert "holds no tokenizer.json" in refused(LANGUAGE_MODEL=folder, OUTPUT=str(tmp_path / "out"))
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert refused(LANGUAGE_MODEL=folder, VERIFY=True).startswith("torch is not installed")
    assert not (tmp_path / "out").exists()


@pytest.mark.scale
@pytest.mark.parametrize("case", [*cases.LANGUAGE_MODELS, *cases.VISION_ENCODERS])
def test_originals_give_what_the_fixtures_hold(
    case: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config, tensors, found = make_fixtures.original(case, tmp_path)
    assert (json.loads(json.dumps(config)), tensors) == cases.fixture(case)
    kept = cases.outputs(case)
    assert sorted(kept) == sorted(found)
    for name in kept:
        assert np.abs(kept[name] - found[name]).max() <= 1e-6 * np.abs(found[name]).max(), name
    key, of = (
        ("LANGUAGE_MODEL", verify.verify_language_model)
        if case in cases.LANGUAGE_MODELS
        else ("VISION_ENCODER", verify.verify_vision_encoder)
    )
    assert convert(monkeypatch, **{key: str(tmp_path), "VERIFY": True}) == 0
    assert "largest relative error" in capsys.readouterr().out
    compared = of(tmp_path)
    assert compared.relative_error <= BAR and (compared.divergence or 0) <= 1e-8


@pytest.mark.scale
def test_torch_interpolates_positions_as_the_fixture_holds() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    kept, found = cases.positions(), make_fixtures.positions()
    assert sorted(kept) == sorted(found)
    for name in kept:
        assert np.abs(kept[name] - found[name]).max() <= 1e-6 * np.abs(found[name]).max(), name


@pytest.mark.scale
@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_whole_models_as_they_are_saved(family: str, tmp_path: pathlib.Path) -> None:
    """Text tower, projections and pooling head beside the vision tower."""
    transformers = pytest.importorskip("transformers")
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=cases.TOWER | {"image_size": 32}
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path)
    assert verify.verify_vision_encoder(tmp_path).relative_error <= BAR


@pytest.mark.scale
def test_a_tied_config_beside_a_head_of_its_own(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    config, tensors = cases.fixture("llama")
    folder = cases.write_folder(tmp_path, config | {"tie_word_embeddings": True}, tensors)
    assert verify.verify_language_model(folder).relative_error <= BAR


@pytest.mark.scale
@pytest.mark.parametrize(
    ("case", "kind"), [("clip", "CLIPImageProcessor"), ("siglip", "SiglipImageProcessor")]
)
@pytest.mark.parametrize("side", [(640, 427), (375, 500), (224, 224)])
def test_pixels_are_those_of_the_original_preprocessor(
    case: str, kind: str, side: tuple[int, int], tmp_path: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config, tensors = cases.fixture(case)
    folder = cases.write_folder(tmp_path, config, tensors)
    size = config["image_size"]
    sizes = {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}}
    processor = getattr(transformers, kind)(
        **(sizes if case == "clip" else {"size": {"height": size, "width": size}})
    )
    processor.save_pretrained(folder)
    pixels = soft_waves(*side)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    ours = load_vision_encoder(folder).preprocess([buffer.getvalue()])[0]
    theirs = processor(images=Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    # In units of the 255 values of a pixel.
    apart = np.abs(ours - theirs.transpose(1, 2, 0)) * np.asarray(processor.image_std) * 255
    print(f"{kind} {side}: mean {apart.mean():.3f}, largest {apart.max():.2f} of 255")
    assert apart.mean() < 0.5 and apart.max() < 4


@pytest.mark.scale
def test_loading_eight_gigabytes(tmp_path: pathlib.Path) -> None:
    """The most memory beside the arrays, and the time beside a bare read of the files from the
    disk, the best of three each.
    """
    if shutil.disk_usage(tmp_path).free < 10e9:
        pytest.skip("10 GB of disk are needed")
    keeping = (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    )
    env = os.environ | {"XLA_FLAGS": "", "GLIBC_TUNABLES": keeping}

    def call(*what: str) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.interop.loading", str(tmp_path), *what],
            cwd=ROOT,
            env=env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return json.loads(done.stdout) if done.stdout else {}

    call("make")
    reads, loads = ([call(what, "cold") for _ in range(3)] for what in ("read", "load"))
    read, load = (max(found, key=lambda one: one["bytes_a_second"]) for found in (reads, loads))
    print(
        f"bare read {read['bytes_a_second'] / 1e9:.2f} GB/s, load"
        f" {load['bytes_a_second'] / 1e9:.2f} GB/s, overhead {load['overhead'] / 2**20:.0f} MiB"
    )
    assert max(one["overhead"] for one in loads) <= 1.2 * load["largest"] + 2**30
    assert load["bytes_a_second"] >= 0.6 * read["bytes_a_second"]
