"""Flamingo-80B's inference compiled for the machines that it would be used on: it fits, and the
length of its programs does not grow with the depth. Minutes and gigabytes each.
`python -m pytest -m scale tests/topology/test_inference_plans.py -s` prints the table.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from configs import flamingo_80b
from flamingo_jax.configuring import from_config
from flamingo_jax.experiment import Experiment, FlamingoConfig
from flamingo_jax.inference.ahead_of_time import InferenceSize, compile_steps
from flamingo_jax.partitioning.mesh import make_mesh

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install -e '.[plan]'",
)


@pytest.mark.scale
@needs_libtpu
@pytest.mark.parametrize("topology", ["v4:2x2x4", "v5e:8x8"])
def test_80b_fits_for_inference(topology: str) -> None:
    command = [
        *(sys.executable, "-m", "launch.plan", "--config=configs/flamingo_80b.py", "--json"),
        *(f"--topology={topology}", "--inference", "--batch=4"),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plan = json.loads(done.stdout.splitlines()[-1])
    assert plan["fits"] and set(plan["programs"]) == {"encode", "prepare", "prefill", "decode"}
    print(f"\n| {topology} | peak GiB | FLOPs / formula | compile s |\n| --- | --- | --- | --- |")
    for name, program in plan["programs"].items():
        formula = plan["flops"].get(name, 0)
        ratio = f"{program['flops'] / formula:.3f}" if formula else "-"
        seconds = program["compile_seconds"]
        print(f"| {name} | {program['peak_bytes'] / GIB:.2f} | {ratio} | {seconds:.0f} |")
        assert program["peak_bytes"] <= plan["chip_bytes"], name
    # The compiler holds no less than the formula counts, and the same FLOPs.
    assert plan["programs"]["decode"]["bytes"]["arguments"] <= 1.02 * plan["total_bytes"]
    prefill = plan["programs"]["prefill"]
    assert 0.95 <= prefill["flops"] / plan["flops"]["prefill"] <= 1.1


@pytest.mark.scale
def test_programs_of_80_layers_are_little_longer_than_those_of_14() -> None:
    """14 layers are two whole groups of 7, 80 eleven and a shorter one. Lowered for the CPUs here,
    since their length before the compiler is what may grow.
    """
    config = from_config(Experiment, flamingo_80b.get_config()).flamingo
    assert config is not None
    mesh = make_mesh("model=8")

    def lines(layers: int) -> dict[str, int]:
        text = dataclasses.replace(config.language_model, layers=layers)
        counts: list[int] = []

        def count(traced: jax.stages.Traced) -> jax.stages.Compiled:
            counts.append(traced.lower().as_text().count("\n"))
            return traced.lower().compile()

        compile_steps(_small(config, text), mesh, InferenceSize(1, 32, 8), count)
        return dict(zip(("encode", "prepare", "prefill", "decode"), counts, strict=True))

    shallow, deep = lines(14), lines(80)
    print(f"\nlines of HLO with 14 layers: {shallow}, with 80: {deep}")
    for name in shallow:
        assert deep[name] <= 1.5 * shallow[name], name


def _small(config: FlamingoConfig, text: object) -> FlamingoConfig:
    """Narrows a model, whose depth alone matters here."""
    assert dataclasses.is_dataclass(text) and not isinstance(text, type)
    attention = dataclasses.replace(config.language_model.attention, heads=8, head_width=16)
    narrow = dataclasses.replace(
        text,
        width=128,
        attention=attention,
        feed_forward=dataclasses.replace(config.language_model.feed_forward, width=256),
        vocab_size=512,
    )
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, variant="tiny", image_size=48),
        language_model=narrow,
        resampler=dataclasses.replace(
            config.resampler, layers=1, width=64, heads=8, head_width=16, feed_forward=64
        ),
        conditioning=dataclasses.replace(
            config.conditioning, heads=8, head_width=16, feed_forward=128
        ),
    )
