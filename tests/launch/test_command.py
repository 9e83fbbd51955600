"""Command lines, right and wrong: one sentence and exit code 2, never a traceback."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from flamingo_jax import configuring
from flamingo_jax.errors import NotFiniteError
from flamingo_jax.experiment import Experiment
from launch import command

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "--config=configs/quickstart.py:flamingo"
PROGRAM = '''"""Does a thing.

    python -m thing --workdir=there
"""
import json
from absl import flags
from flamingo_jax import configuring, errors
from launch import command

WORKDIR = flags.DEFINE_string("workdir", "here", "Folder to work in.")
KIND = flags.DEFINE_enum("kind", "one", ("one", "two"), "Which.")
PLACES = flags.DEFINE_multi_string("place", [], "Where.")
CONFIG = command.define_config()

def main():
    if WORKDIR.value == "bad":
        raise errors.NotFiniteError("stopped")
    print(json.dumps(configuring.to_json(command.experiment(CONFIG))))
    return 7

if __name__ == "__main__":
    command.run(main)
'''
Call = Callable[..., tuple[int, str, str]]


SERVER = """
import json, os, runpy, sys, traceback
import flamingo_jax.experiment, launch.command, launch.command_help
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
        sys.argv, code = arguments, 1
        try:
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs programs, each in a process of its own that has all imports already."""


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Runs PROGRAM: (*arguments) -> (exit code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("command")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    said = [folder / "stdout", folder / "stderr"]

    def run(*arguments: str) -> tuple[int, str, str]:
        for file in said:
            file.unlink(missing_ok=True)
        line = json.dumps([[str(program), *arguments], *map(str, said)])
        print(line, file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return code, said[0].read_text(), said[1].read_text()

    yield run
    server.stdin.close()
    server.wait()


def test_overrides_reach_the_experiment_and_main_gives_the_exit_code(call: Call) -> None:
    code, out, _ = call(
        CONFIG,
        "--config.seed=3",
        "--config.training.steps",
        "9",
        "--noconfig.training.use_visuals",
        "--config.data.m3w.p_next=1",
        "--config.optimizer.weight_decay_exclude=('a.*', 'b')",
        "--config.tokenizer=",
    )
    experiment = configuring.from_json(Experiment, json.loads(out))
    assert (
        code == 7
        and experiment.seed == 3
        and experiment.training.steps == 9
        and not experiment.training.use_visuals
    )
    assert (
        experiment.data["m3w"].p_next == 1.0
        and experiment.optimizer.weight_decay_exclude == ("a.*", "b")
        and experiment.tokenizer == ""
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "--config is not set: name a config file"),
        ((CONFIG, "--config.sed=3"), "config has no key 'sed', did you mean seed?"),
        (
            (CONFIG, "--config.training.step=3"),
            "config.training has no key 'step', did you mean steps?",
        ),
        (
            (CONFIG, "--config.data.mw.weight=3"),
            "config.data has no key 'mw', did you mean m3w?",
        ),
        ((CONFIG, "--config.contrastive.joint_width=3"), "config.contrastive is None here"),
        ((CONFIG, "--config.seed=abc"), "config.seed is 'abc', but must be an int"),
        ((CONFIG, "--config.seed=1.5"), "config.seed is '1.5', but must be an int"),
        (
            (CONFIG, "--config.training.use_visuals=maybe"),
            "config.training.use_visuals is 'maybe', but must be a bool",
        ),
        (
            (CONFIG, "--config.task=sleep"),
            "config.task is 'sleep', but must be one of 'contrastive'",
        ),
        (
            (CONFIG, "--config.optimizer.weight_decay_exclude=(1, 2)"),
            "config.optimizer.weight_decay_exclude[0] is 1, but must be a string",
        ),
        (
            (CONFIG, "--config.optimizer=3"),
            "config.optimizer is an OptimizerConfig: set its keys one by one",
        ),
        (
            (CONFIG, "--config.data=3"),
            "config.data is a dict of DatasetConfigs by name: set its keys one by one",
        ),
        (("--config.seed=3",), "--config.seed comes without --config=FILE"),
        (("--config=nowhere.py",), "there is no file nowhere.py"),
        (
            (CONFIG + "x",),
            "configs/quickstart.py has no stage 'flamingox': choose one of contrastive",
        ),
        ((CONFIG, "--wrkdir=x"), "there is no flag --wrkdir, did you mean --workdir?"),
        ((CONFIG, "--kind=three"), "flag --kind=three: value should be one of <one|two>"),
        ((CONFIG, "stray"), "'stray' is no flag"),
    ],
)
def test_a_mistake_is_one_sentence(call: Call, arguments: tuple[str, ...], sentence: str) -> None:
    code, out, err = call(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def get_config(:\n", "fails with SyntaxError"),
        ("x = 1\n", "has no attribute 'get_config'"),
        (
            "def get_config():\n    return missing\n",
            "fails with NameError: name 'missing' is not defined (",
        ),
        ("def get_config():\n    return 3\n", "get_config returned int, not a ConfigDict"),
    ],
)
def test_a_broken_config_file_is_one_sentence(
    call: Call, tmp_path: pathlib.Path, text: str, sentence: str
) -> None:
    (tmp_path / "config.py").write_text(text)
    code, _, err = call(f"--config={tmp_path}/config.py")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_errors_bring_their_own_exit_code(call: Call) -> None:
    code, _, err = call(CONFIG, "--workdir=bad")
    assert (code, err) == (NotFiniteError.exit_code, "error: stopped\n")


def test_help_is_the_docstring_the_flags_and_the_keys(call: Call) -> None:
    code, out, err = call("--help")
    assert code == 0 and err == "" and out.startswith("Does a thing.")
    for part in (
        "--config\n",
        "--workdir\n",
        "      Folder to work in. (default: here)\n",
        "      Which. One of one, two. (default: one)\n",
        "      Where. May be given several times.\n",
    ):
        assert part in out
    assert "--config.optimizer.learning_rate=0.002" in call(CONFIG, "--help")[1]


def test_a_written_config_is_read_again(tmp_path: pathlib.Path) -> None:
    experiment = Experiment(name="x")
    command.write_config(experiment, tmp_path / "config.json")
    command.write_config(experiment, tmp_path / "config.json")
    assert (
        configuring.from_json(Experiment, json.loads((tmp_path / "config.json").read_text()))
        == experiment
    )
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


STUCK = '''
"""Leaves a thread behind that waits for storage."""
import concurrent.futures, threading
from flamingo_jax import errors
from launch import command

def main():
    concurrent.futures.ThreadPoolExecutor().submit(threading.Event().wait)
    print("all is said")
    {end}

if __name__ == "__main__":
    command.EXIT_SECONDS = 0.5
    command.run(main)
'''


@pytest.mark.parametrize(
    ("end", "code"),
    [("return 7", 7), ("raise errors.StorageError('gone')", 74), ("raise SystemExit(75)", 75)],
)
def test_a_thread_that_is_stuck_on_storage_keeps_no_command_from_ending(
    end: str, code: int, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "stuck.py").write_text(STUCK.format(end=end))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, tmp_path / "stuck.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code and done.stdout == "all is said\n", done.stderr
