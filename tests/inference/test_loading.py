"""From an exported folder to text, in this process and by the command."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.errors import UserError
from flamingo_jax.inference.loading import load_flamingo
from flamingo_jax.pytrees import to_flat
from tests.inference.tiny_models import make_loaded
from tests.processes import one_device

LOADED = make_loaded()


def parameters() -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in to_flat(nnx.split(LOADED.model)[1]).items()}


def export(
    folder: pathlib.Path, values: dict[str, np.ndarray], kind: str = "flamingo"
) -> pathlib.Path:
    LOADED.tokenizer.save(folder)
    export_model(
        folder / "export",
        kind=kind,
        config=dataclasses.asdict(LOADED.config),
        parameters=values,
        tokenizer_file=folder / "tokenizer.model",
    )
    return folder / "export"


def test_an_export_is_loaded_as_it_was_saved(tmp_path: pathlib.Path) -> None:
    values = parameters()
    name = "language_model/layers/attention/query"
    values[name] = values[name].astype(jnp.bfloat16)
    loaded = load_flamingo(export(tmp_path, values))
    assert loaded.config == LOADED.config
    assert loaded.tokenizer.fingerprint == LOADED.tokenizer.fingerprint
    found = to_flat(nnx.split(loaded.model)[1])
    assert found.keys() == values.keys()
    for key, value in values.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)


def test_a_flipped_byte_is_found_and_named(tmp_path: pathlib.Path) -> None:
    folder = export(tmp_path, parameters())
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name} has other content"):
        load_flamingo(folder)


def test_what_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    values = parameters()
    name = "extra_embedding"
    cases = {
        "lacks extra_embedding": {key: value for key, value in values.items() if key != name},
        "unknown parameter foreign": values | {"foreign": np.zeros(2)},
        "extra_embedding is": values | {name: values[name][:, :3]},
    }
    for said, wrong in cases.items():
        folder = tmp_path / said.replace(" ", "_")
        folder.mkdir()
        with pytest.raises(UserError, match=said):
            load_flamingo(export(folder, wrong))
    with pytest.raises(UserError, match="contrastive export"):
        load_flamingo(export(tmp_path, values, kind="contrastive"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = pathlib.Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-m", "launch.generate", *arguments],
        cwd=root,
        env=one_device(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_continues_every_prompt_of_a_file(tmp_path: pathlib.Path) -> None:
    folder = export(tmp_path, parameters())
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(tmp_path / "a.png")
    frames = [Image.fromarray(np.full((32, 32, 3), 60 * n, np.uint8)) for n in range(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=1000)
    lines = [
        [
            {"image": "a.png"},
            {"text": "Output: a star"},
            {"video": "clip.gif"},
            {"text": "Output:"},
        ],
        [{"text": "<image>Question: what is this? Answer:"}, {"image": "a.png"}],
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = run(
        f"--model={folder}", f"--prompt={tmp_path}/prompts.jsonl", "--max_tokens=2", "--beam_size=1"
    )
    assert made.returncode == 0, made.stderr
    assert len(made.stdout.splitlines()) == 2
    streamed = run(
        f"--model={folder}", f"--prompt={tmp_path}/prompts.jsonl", "--max_tokens=2", "--stream"
    )
    assert streamed.stdout == made.stdout, streamed.stderr
    refused = run(
        f"--model={folder}", f"--prompt={tmp_path}/prompts.jsonl", "--stream", "--n_best=2"
    )
    assert refused.returncode == 2 and refused.stderr.startswith("error: --stream writes every")

    (tmp_path / "wrong.json").write_text('[{"text": "<image><image>Output:"}, {"image": "a.png"}]')
    refused = run(f"--model={folder}", f"--prompt={tmp_path}/wrong.json")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: more image tags than images in a prompt")
    assert len(refused.stderr.splitlines()) == 1
