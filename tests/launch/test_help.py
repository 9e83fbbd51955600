"""--help of every command: at once, without jax, with a sentence for each config key."""

import pathlib
import subprocess
import sys

import pytest

from flamingo_jax.configuring import described_keys, to_config
from flamingo_jax.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = sorted(
    file.stem
    for file in (ROOT / "launch").glob("*.py")
    if "command.run(" in file.read_text() and file.stem != "command"
)
SLOW = ("jax", "orbax", "tensorflow_datasets", "matplotlib", "scipy")
"""What takes long to import."""
MEASURE = """
import resource, runpy, sys
sys.argv[0] = sys.argv.pop(1)
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    used = resource.getrusage(resource.RUSAGE_SELF)
    slow = [name for name in {slow!r} if name in sys.modules]
    print(end.code, used.ru_utime + used.ru_stime, *slow, file=sys.stderr)
"""


def run(*arguments: str) -> tuple[str, int, float, list[str]]:
    """Runs a command: what it printed, its exit code, seconds of CPU, slow imports."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(slow=SLOW), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    code, seconds, *slow = done.stderr.split("\n")[-2].split()
    return done.stdout + done.stderr, int(code), float(seconds), slow


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there_at_once(command: str) -> None:
    printed, code, seconds, slow = run(f"launch.{command}", "--help")
    assert code == 0 and "Flags:" in printed and not slow
    # Half of a second on a quiet machine is the aim; another's work next door may double it.
    assert seconds < 1.0


@pytest.mark.parametrize(
    ("command", "shared"),
    [
        ("generate", ("parts", "fps", "frames")),
        ("playground", ("fps", "frames")),
        ("evaluate", ("parts",)),
    ],
)
def test_flags_that_commands_share_are_in_the_help_of_each(
    command: str, shared: tuple[str, ...]
) -> None:
    printed = run(f"launch.{command}", "--help")[0].splitlines()
    assert not [name for name in shared if f"  --{name}" not in printed]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("launch.train",), "--config is not set"),
        (
            ("launch.train", "--config=configs/flamingo_3b.py", "--config.sed=1"),
            "config has no key 'sed'",
        ),
        (("launch.train", "--config=configs/flamingo_3b.py:big"), "has no form 'big'"),
        (("launch.plan", "--config=configs/flamingo_9b.py"), "nothing to plan"),
        (("launch.export", "--workdir=runs/a"), "--output is not set"),
        (("launch.playground",), "--model is not set"),
        (("launch.convert",), "name the folder of one model"),
        (("launch.benchmark", "data"), "data to read: name a config"),
        (("launch.evaluate",), "name one of --benchmark, --suite or --evaluator"),
        (
            ("launch.evaluate", "--evaluator=held_out", "--shots=4"),
            "--shots is not read by --evaluator but by --benchmark, --suite, --suite=quickstart",
        ),
        (
            ("launch.evaluate", "--suite=quickstart", "--fps=3"),
            "--fps is not read by --suite=quickstart but by --benchmark, --suite",
        ),
        (
            ("launch.evaluate", "--benchmark=reading:a=b", "--model=m", "--output=o"),
            "with KIND one of captioning",
        ),
        (("launch.compare", "only_one"), "name two runs or more"),
        (
            ("launch.evaluate", "--suite=flikr30k", "--data=d", "--model=m", "--output=o"),
            "there is no benchmark or suite 'flikr30k', did you mean flickr30k?",
        ),
        (("launch.evaluate", "--evaluator=held_out"), "name what is measured: --workdir=FOLDER"),
    ],
)
def test_a_mistake_is_told_without_jax(arguments: tuple[str, ...], sentence: str) -> None:
    printed, code, _, slow = run(*arguments)
    assert code == 2 and sentence in printed and not slow


def test_help_lists_each_key_of_a_config_with_its_sentence() -> None:
    printed, *_ = run("launch.train", "--config=configs/quickstart.py:flamingo", "--help")
    assert (
        "  --config.training.keep_every=0\n"
        "      Checkpoints at multiples of this stay for ever; 0 for none.\n"
    ) in printed
    assert "  --config.data.m3w.kind=pages\n" in printed


def test_the_schemas_keys_are_those_of_a_config() -> None:
    """Both ways to list them agree where a config has a part."""
    schema = {key: value for key, value, _ in described_keys(Experiment)}
    config = to_config(Experiment())
    listed = dict(key[:2] for key in described_keys(Experiment, config.to_dict()))
    assert {key: value for key, value in listed.items() if value not in (None, {})}.items() <= (
        schema.items()
    )
    assert "data.NAME.kind" in schema and "flamingo.conditioning.xattn_every" in schema


def test_every_key_has_a_sentence() -> None:
    assert [key for key, _, sentence in described_keys(Experiment) if not sentence] == []
