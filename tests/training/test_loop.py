"""The loop: resume to the bit, signals, non-finite runs, frozen parameters."""

import dataclasses
import os
import pathlib
import shutil
import signal
import types
from typing import Any

import jax
import numpy as np
import pytest

from flamingo_jax.checkpointing.checkpoints import Checkpoints
from flamingo_jax.errors import NotFiniteError, NotLearnedError, UserError
from flamingo_jax.experiment import Experiment, LoRAConfig
from flamingo_jax.json_lines import read_lines
from flamingo_jax.partitioning.mesh import make_mesh
from flamingo_jax.tasks.flops import Cost, Work, step_cost, work_in
from flamingo_jax.training import loop, metrics_buffer
from flamingo_jax.training.setup import make_setup
from tests.training import world


def losses(workdir: pathlib.Path) -> dict[int, float]:
    return {
        line["step"]: line["loss"]
        for line in read_lines(workdir / "metrics.jsonl")
        if "loss" in line
    }


class Stopping(world.Stream):
    """Sends this process SIGTERM as batch `at` is read."""

    at = 4

    def __next__(self) -> dict[str, np.ndarray]:
        batch = super().__next__()
        if self.position == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch


class Probe:
    """An evaluator of every fourth step, which looks at what is saved by then."""

    every = 4

    def __init__(self, workdir: pathlib.Path):
        self._workdir = workdir

    def compile(self, trainable: Any, frozen: Any) -> dict[str, jax.stages.Compiled]:
        return {}

    def __call__(self, trainable: Any, frozen: Any) -> dict[str, float]:
        saved = [int(p.name) for p in (self._workdir / "checkpoints").iterdir() if p.name.isdigit()]
        norm = sum(float(np.square(np.asarray(a, np.float64)).sum()) for a in trainable.values())
        return {"newest": max(saved, default=0), "norm": norm**0.5, "frozen": len(frozen)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("unbroken")
    experiment = world.experiment(held_out={"vtp": world.DATA["vtp"]})
    outcome = loop.train(
        experiment,
        world.streams(),
        {"vtp": [world.batch(world.DATA["vtp"], 9)]},
        workdir,
        evaluators={"probe": Probe(workdir)},
    )
    assert outcome == loop.TrainResult(6, preempted=False)
    return workdir


def test_every_step_is_recorded_with_its_gates(unbroken: pathlib.Path) -> None:
    lines = read_lines(unbroken / "metrics.jsonl")
    assert sorted(losses(unbroken)) == [1, 2, 3, 4, 5, 6]
    assert (
        len(lines[3]["gates/attention"]) == 2
        and lines[0]["gates/attention"] != lines[5]["gates/attention"]
    )
    held_out = lines[-1]
    assert held_out["held_out/vtp/loss"] > 0 and held_out["held_out/vtp/loss_without_images"] > 0
    weight = world.DATA["vtp"].weight
    assert weight != 1 and held_out["held_out/loss"] == pytest.approx(
        weight * held_out["held_out/vtp/loss"]
    )


def test_an_evaluator_has_its_own_period(unbroken: pathlib.Path) -> None:
    """It sees the state of its step, which is saved after it has been evaluated, and that of the
    end.
    """
    lines = read_lines(unbroken / "metrics.jsonl")
    found = {line["step"]: line for line in lines if "probe/norm" in line}
    assert list(found) == [4, 6] and found[4]["probe/newest"] < 4
    norms = {line["step"]: line["parameter_norm"] for line in lines if "loss" in line}
    for step, line in found.items():
        assert line["probe/norm"] == pytest.approx(norms[step], rel=1e-5)
    assert "held_out/loss" in found[6] and "held_out/loss" not in found[4]
    with pytest.raises(UserError, match="an evaluator is named 'held_out'"):
        loop.train(
            world.experiment(),
            world.streams(),
            {},
            unbroken,
            evaluators={"held_out": Probe(unbroken)},
        )


def test_speed_is_recorded_in_model_flops(unbroken: pathlib.Path) -> None:
    """Batches differ in their tokens, so that a step credited with another's work would show."""
    cost = step_cost(world.experiment())
    lines = [line for line in read_lines(unbroken / "metrics.jsonl") if "loss" in line]
    stream = world.streams()
    for line in lines:
        batches = [next(s) for s in stream.values()]
        work = work_in(batches)
        assert line["flops_per_second"] / line["tokens_per_second"] == pytest.approx(
            cost.of(work) / work.tokens
        )
        assert line["images_per_second"] / line["tokens_per_second"] == pytest.approx(
            work.frames / work.tokens
        )
        room = sum(batch["segments"].size for batch in batches)
        assert line["used_token_share"] == pytest.approx(work.tokens / room) and work.tokens < room
        assert "mfu" not in line


def test_rate_and_norms_are_recorded(unbroken: pathlib.Path) -> None:
    """The config warms up over two steps."""
    lines = [line for line in read_lines(unbroken / "metrics.jsonl") if "loss" in line]
    peak = world.experiment().optimizer.learning_rate
    assert [line["learning_rate"] for line in lines] == pytest.approx([peak / 2] + [peak] * 5)
    for line in lines:
        assert line["gradient_norm"] > 0
        # One stream has all datasets' gradient at once.
        assert not any(name.startswith("gradient_norm/") for name in line)
    checkpoints = Checkpoints(unbroken / "checkpoints", keep_last=3, keep_every=0)
    state = checkpoints.restore(
        6, make_setup(world.experiment(), make_mesh(world.experiment().mesh)).state
    )
    checkpoints.close()
    total = sum(
        float(np.square(np.asarray(value, np.float64)).sum()) for value in state.trainable.values()
    )
    assert lines[-1]["parameter_norm"] == pytest.approx(total**0.5, rel=1e-5)


def ready(count: int = 0, **work: int) -> dict[str, Any]:
    """A step's metrics, so many of the last steps having been skipped."""
    return {
        "skipped_in_a_row": np.int32(count),
        "finite/a": np.True_,
        "work": np.array(Work(**work), np.int32),
        "computed_tokens": 20,
    }


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(
        metrics_buffer, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
    )
    measured = metrics_buffer.MetricsBuffer(1, ["a"], Cost(token=600, frame=1_000), peak=8_000.0)
    assert measured.add(1, ready(tokens=10, frames=2)) == []
    ((step, values),) = measured.drain()
    assert (
        step == 1
        and values["tokens_per_second"] == 5
        and values["flops_per_second"] == 4_000
        and values["mfu"] == 0.5
    )
    assert values["images_per_second"] == 1


def test_speed_is_of_the_window_since_the_line_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow step between two lines counts, a save does not; sums pass 32 bits."""
    now, most = 0.0, 2**31 - 1

    def device_get(metrics: dict[str, Any]) -> dict[str, Any]:
        nonlocal now
        now += metrics["seconds"]
        return metrics

    monkeypatch.setattr(metrics_buffer, "time", types.SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(metrics_buffer, "jax", types.SimpleNamespace(device_get=device_get))
    measured = metrics_buffer.MetricsBuffer(1, ["a"], Cost(token=1), peak=None, log_every=3, last=7)
    lines = []
    for step, seconds in enumerate([1, 8, 1, 2, 2, 2, 3], start=1):
        lines += measured.add(step, ready(tokens=most) | {"seconds": seconds})
        if step == 3:
            lines += measured.drain()
            with measured.paused():
                now += 1_000
    lines += measured.drain()
    assert [step for step, _ in lines] == [3, 6, 7]
    speeds = [values["tokens_per_second"] for _, values in lines]
    # The last two steps are waited for together, and share 5 s.
    assert speeds == pytest.approx([most * 3 / 10, most * 3 / 6.5, most / 2.5])


def test_a_signal_saves_and_the_next_start_goes_on_to_the_bit(
    unbroken: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    streams = world.streams() | {"m3w": Stopping(world.DATA["m3w"], 0)}
    outcome = loop.train(world.experiment(), streams, {}, tmp_path)
    assert outcome.preempted and 0 < outcome.step < 6
    again = loop.train(world.experiment(), world.streams(), {}, tmp_path)
    assert again == loop.TrainResult(6, preempted=False)
    assert losses(tmp_path) == losses(unbroken)


def test_the_number_of_devices_does_not_change_the_losses(
    unbroken: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    mesh = dataclasses.replace(world.experiment().mesh, data=2, fsdp=2, model=2)
    loop.train(world.experiment(mesh=mesh), world.streams(), {}, tmp_path)
    for step, loss in losses(unbroken).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-5)


def test_a_frozen_part_that_changed_is_refused(unbroken: pathlib.Path) -> None:
    with pytest.raises(UserError, match="now holds another"):
        loop.train(world.experiment(seed=1), world.streams(), {}, unbroken)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data": {"m3w": world.DATA["m3w"]}},
            r"config\.data = \['align', 'ltip', 'm3w', 'vtp'\], but it is \['m3w'\] here",
        ),
        (
            {"data": world.DATA | {"vtp": dataclasses.replace(world.DATA["vtp"], max_length=16)}},
            r"config\.data\.vtp\.max_length = 12, but it is 16 here",
        ),
        (
            {
                "flamingo": dataclasses.replace(
                    world.FLAMINGO,
                    conditioning=dataclasses.replace(
                        world.FLAMINGO.conditioning, attend_to_media="all_previous"
                    ),
                )
            },
            r"config\.flamingo\.conditioning\.attend_to_media = 'last'",
        ),
        (
            {"training": dataclasses.replace(world.experiment().training, lora=LoRAConfig(rank=4))},
            r"config\.training\.lora\.rank = 0, but it is 4 here",
        ),
        (
            {"training": dataclasses.replace(world.experiment().training, use_visuals=False)},
            r"config\.training\.use_visuals = True",
        ),
    ],
)
def test_another_run_is_refused(
    unbroken: pathlib.Path, changes: dict[str, Any], sentence: str
) -> None:
    before = (unbroken / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=sentence):
        loop.train(world.experiment(**changes), world.streams(), {}, unbroken)
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_not_finite_stops_and_names_the_gradient(tmp_path: pathlib.Path) -> None:
    optimizer = dataclasses.replace(
        world.experiment().optimizer, learning_rate=float("inf"), warmup_steps=0
    )
    training = dataclasses.replace(world.experiment().training, max_not_finite=1, steps=20)
    with pytest.raises(NotFiniteError, match="not finite, 2 steps in a row"):
        loop.train(
            world.experiment(optimizer=optimizer, training=training),
            world.streams(),
            {},
            tmp_path,
        )


def test_a_run_above_its_required_loss_is_saved_and_says_so(
    unbroken: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    held_out = {"vtp": [world.batch(world.DATA["vtp"], 9)]}
    reached = read_lines(unbroken / "metrics.jsonl")[-1]["held_out/vtp/loss_per_token"]

    def requiring(**most: float) -> Experiment:
        return world.experiment(
            training=dataclasses.replace(world.experiment().training, required_loss=most)
        )

    shutil.copytree(unbroken, tmp_path / "run")
    loop.train(requiring(vtp=reached + 1e-3), world.streams(), held_out, tmp_path / "run")
    # Also where nothing was left to train: the next stage must not start because a launcher
    # tried twice.
    with pytest.raises(
        NotLearnedError, match=r"on vtp, above the .* higher config\.training\.steps"
    ):
        loop.train(requiring(vtp=reached - 1e-3), world.streams(), held_out, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "6").is_dir()
    recorded = read_lines(tmp_path / "run" / "metrics.jsonl")
    shorter = requiring(vtp=reached - 1e-3)
    shorter = dataclasses.replace(shorter, training=dataclasses.replace(shorter.training, steps=4))
    with pytest.raises(NotLearnedError, match="on vtp"):
        loop.train(shorter, world.streams(), held_out, tmp_path / "run")
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == recorded
    with pytest.raises(UserError, match="'vtt', which is no held-out dataset"):
        loop.train(requiring(vtt=1.0), world.streams(), held_out, tmp_path / "run")


def test_frozen_parameters_have_no_gradient_or_moments() -> None:
    experiment = world.experiment()
    setup = make_setup(experiment, make_mesh(experiment.mesh))
    assert not any(
        name.startswith(("vision_encoder", "language_model")) for name in setup.trainable
    )
    trained = sum(int(np.prod(s.shape)) for s in setup.trainable.values())
    moments = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(setup.state.optimizer))
    assert moments <= 2 * trained + 10
