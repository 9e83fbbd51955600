"""The device check: at its tiny size with nothing but the libraries that a bare machine has, and
its sections' processes, which may fail or hang.
"""

import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from flamingo_jax.errors import UserError
from flamingo_jax.planning.device_check import attention
from flamingo_jax.planning.device_check.check import run_section
from flamingo_jax.planning.device_check.photos import make_photos
from flamingo_jax.planning.device_check.sections import (
    Budget,
    CheckFailed,
    Results,
    Section,
    run_sections,
)
from flamingo_jax.planning.device_check.tables import section_table
from flamingo_jax.planning.device_check.trace import top_operations
from launch.device_check import check_size

ROOT = pathlib.Path(__file__).parents[2]
BARE = """
    import importlib.metadata, pathlib, re, sys

    allowed = set()

    def allow(name):
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in allowed:
            return
        allowed.add(name)
        try:
            wanted = importlib.metadata.distribution(name).requires or []
        except importlib.metadata.PackageNotFoundError:
            return
        for requirement in wanted:
            if "extra ==" not in requirement:
                allow(re.match(r"[\\w.\\-]+", requirement)[0])

    # What pip installs with these.
    for name in ("jax", "flax", "optax", "numpy", "pillow", "safetensors"):
        allow(name)
    homes = importlib.metadata.packages_distributions()

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            top = name.partition(".")[0]
            owners = {re.sub(r"[-_.]+", "-", owner).lower() for owner in homes.get(top, [])}
            if owners and not owners & (allowed | {"flamingo-jax"}):
                raise ImportError(f"{name} is not on a bare machine")

    sys.meta_path.insert(0, Blocker())
    sys.path.insert(0, sys.argv[1])
    try:
        import ml_collections
    except ImportError:
        pass
    else:
        raise SystemExit("the blocker does not block")
    from launch.benchmark import device_check
    from flamingo_jax.planning.device_check.check import CHECKS

    for name in CHECKS:
        device_check.run(sys.argv[2], 5.0, "tiny", name, None)
    from launch import benchmark
"""
"""Runs all sections of the tiny size in one process that can import only the bare libraries."""


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The results of all sections at the tiny size."""
    folder = tmp_path_factory.mktemp("device")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(BARE), str(ROOT), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def _found(folder: pathlib.Path, section: str) -> dict[str, object]:
    return json.loads((folder / f"{section}.json").read_text())


def test_attention_agrees_with_float32(checked: pathlib.Path) -> None:
    found = _found(checked, "attention")
    for case in ("packed rows", "cross-attention", "a decoded token"):
        made = found[case]
        assert isinstance(made, dict)
        assert made["agrees"] and made["kernel"] == "keys_first_attention"
        assert 0 < max(made["errors"].values()) < 1e-5


def test_the_step_is_measured_on_made_images_and_on_photos(checked: pathlib.Path) -> None:
    found = _found(checked, "step")
    photos, first = found["photos"], found["1_microbatches"]
    assert isinstance(photos, dict) and isinstance(first, dict)
    assert found["best_microbatches"] == 1 and found["mfu"] == first["mfu"]
    assert first["mfu"] == pytest.approx(
        first["flops"] / first["step_seconds"] / found["matrix_rate"]
    )
    assert np.isfinite(photos["loss"]) and 0 <= photos["waiting_share"] <= 1
    assert set(found["parts_seconds"]) >= {"vision encoder", "resampler", "language model"}
    operations = found["trace"]
    assert isinstance(operations, list) and operations
    assert operations[0]["share"] >= operations[-1]["share"] > 0


def test_generation_is_timed_by_batch(checked: pathlib.Path) -> None:
    found = _found(checked, "generation")
    made = found["batch 1"]
    assert isinstance(made, dict) and len(made) == 3
    assert made["prefill_tokens_per_second"] > 0 and made["caption_seconds_3_beams"] > 0


def test_resuming_is_exact_and_would_be_seen_if_not(checked: pathlib.Path) -> None:
    found = _found(checked, "resume")
    changed = found["arrays_that_training_changed"]
    assert found["losses"] == found["losses_after_resuming"] and not found["arrays_that_differ"]
    assert isinstance(changed, int) and changed > 10


def test_images_are_decoded(checked: pathlib.Path) -> None:
    found = _found(checked, "images")
    rate = found["images_per_second_of_all_cores"]
    assert isinstance(rate, float) and rate > 0 and found["cores"]


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Both a value that is off and a query that should see nothing."""
    right = attention.attend

    def check() -> None:
        attention.check_attention(check_size("tiny"), Results(tmp_path, "attention"), Budget(60.0))

    monkeypatch.setattr(attention, "attend", lambda *given: right(*given) * 1.01)
    with pytest.raises(CheckFailed, match="packed rows"):
        check()
    monkeypatch.setattr(
        attention,
        "attend",
        lambda *given: jnp.where(given[3].any(-1).swapaxes(1, 2)[..., None], right(*given), 1e-9),
    )
    with pytest.raises(CheckFailed, match="cross-attention"):
        check()


WORK = """
    import json, pathlib, sys, time
    name, folder = sys.argv[1:]
    pathlib.Path(folder, f"{name}.json").write_text(json.dumps({"so far": 1}))
    print("a line before")
    if name == "fails":
        sys.exit("error: it is broken")
    time.sleep({"hangs": 60}.get(name, 0))
"""


def test_a_section_that_fails_or_hangs_takes_no_other_with_it(tmp_path: pathlib.Path) -> None:
    sections = [Section("fails", 0.1), Section("hangs", 0.3), Section("works", 0.6)]
    given, ended = {}, []

    def command(section: Section, seconds: float) -> list[str]:
        given[section.name] = seconds
        return [sys.executable, "-c", textwrap.dedent(WORK), section.name, str(tmp_path)]

    began = time.monotonic()
    found = run_sections(
        tmp_path, 0.08, command, sections, on_end=lambda name, made: ended.append(name)
    )
    assert time.monotonic() - began < 30
    assert {name: made["status"] for name, made in found["sections"].items()} == {
        "fails": "failed",
        "hangs": "timed out",
        "works": "passed",
    }
    assert not found["passed"] and ended == ["fails", "hangs", "works"]
    assert found["sections"]["fails"]["error"] == "error: it is broken"
    assert all(made["results"] == {"so far": 1} for made in found["sections"].values())
    assert json.loads((tmp_path / "device.json").read_text()) == found
    assert (tmp_path / "fails.log").read_text().startswith("a line before")
    # All that the first did not take is shared by the others.
    assert given["hangs"] > 0.3 * 4.8 * 0.9 and given["works"] > 2.0


def test_the_top_of_a_trace_is_that_of_the_devices(tmp_path: pathlib.Path) -> None:
    events = [
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "/device:GPU:0"}},
        {"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "/host:CPU"}},
        *(
            {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
            for pid, tid, name in ((1, 7, "Stream #7(Compute)"), (1, 8, "Steps"), (2, 1, "XLA"))
        ),
        *({"name": "gemm", "ph": "X", "pid": 1, "tid": 7, "dur": 30} for _ in range(2)),
        {"name": "fusion", "ph": "X", "pid": 1, "tid": 7, "dur": 40},
        {"name": "whole step", "ph": "X", "pid": 1, "tid": 8, "dur": 500},
        {"name": "thunk", "ph": "X", "pid": 2, "tid": 1, "dur": 900},
    ]
    folder = tmp_path / "plugins" / "profile"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    first, second = top_operations(tmp_path, 5)
    assert (first["name"], first["times"], first["milliseconds"]) == ("gemm", 2, 0.06)
    assert (second["name"], second["share"]) == ("fusion", 0.4)
    assert top_operations(tmp_path / "plugins", 1) == [first]
    assert top_operations(tmp_path / "none", 5) == []


def test_the_full_size_wants_an_accelerator(tmp_path: pathlib.Path) -> None:
    size = check_size("full")
    # Each number of microbatches divides every dataset's rows.
    for dataset in size.train.data.values():
        assert all(dataset.batch_size % count == 0 for count in size.microbatches)
    with pytest.raises(UserError, match="--size=tiny"):
        run_section("attention", size, tmp_path, 60.0)


def test_results_are_laid_out_with_their_units() -> None:
    results = {
        "mfu": 0.456,
        "first": {"peak_bytes": 3 * 2**30, "step_seconds": 7.25, "agrees": True},
        "trace": [{"name": "gemm", "milliseconds": 1.5, "times": 2, "share": 0.5}],
        "arrays_that_differ": [],
    }
    found = {"status": "failed", "seconds": 3.0, "error": "it is broken", "results": results}
    console = Console(width=120, file=io.StringIO())
    console.print(section_table("step", found))
    shown = console.file.getvalue()
    for text in ("45.6%", "3.00 GiB", "7.25", "1.50 ms, 50.0%", "none", "it is broken"):
        assert text in shown


def test_photos_are_as_large_as_photos() -> None:
    small, other = make_photos(2, (160, 120))
    assert small != other and 0.1 < len(small) / (160 * 120) < 1.5
