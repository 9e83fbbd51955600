"""The READMEs' code: every command has flags, keys and files that are there, and what is not
said to be too much for tests runs word for word, top to bottom, on small data.
"""

import importlib
import os
import pathlib
import re
import shlex
import stat
import subprocess
import sys

import pytest

from data_pipelines.build.sources import SOURCES
from data_pipelines.build.synthetic_world import build_quickstart
from flamingo_jax import configuring
from flamingo_jax.experiment import Experiment
from launch import command
from tests.inference.tiny_models import make_export
from tests.readme_blocks import ROOT, Block, blocks, commands, make_small_data

FILES = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
BLOCKS = [block for file in FILES for block in blocks(file)]
RUN = {file: [b for b in BLOCKS if b.file == file and not b.reason] for file in FILES}
LONG = {"README.md", "data_pipelines/README.md", "flamingo_jax/evaluation/README.md"}
"""Files whose blocks train several stages, even if of two steps each, or evaluate with many shots:
minutes.
"""
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)\)")


def test_blocks_are_found() -> None:
    assert len(BLOCKS) > 10 and sum(map(len, RUN.values())) > 5


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere(file: str) -> None:
    text = (ROOT / file).read_text()
    for target in LINK.findall(text):
        assert ((ROOT / file).parent / target).exists(), target


def launched() -> list[tuple[str, list[str]]]:
    """(command's module, its arguments) of every launch command in a README."""
    found = []
    for block in BLOCKS:
        for line in commands(block.text) if block.language == "sh" else []:
            words = shlex.split(line, comments=True)
            if "launch." in line and "-m" in words:
                place = words.index("-m") + 1
                if words[place].startswith("launch."):
                    end = next((n for n, word in enumerate(words) if word in ("&", ";")), None)
                    found.append((words[place], words[place + 1 : end]))
    return found


@pytest.mark.parametrize(
    ("module", "arguments"), launched(), ids=lambda part: str(part)[:70].replace("/", ".")
)
def test_a_command_has_the_flags_and_the_config_that_it_is_given(
    module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    names = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)) | {"help"}
    names |= {f"no{name}" for name in re.findall(r'DEFINE_bool(?:ean)?\(\s*"(\w+)"', source)}
    if module == "launch.build_data" and arguments[0] in SOURCES:
        names |= set(SOURCES[arguments[0]].options)
    for argument in arguments:
        if not argument.startswith("--"):
            assert argument.isidentifier(), argument
            continue
        name, _, value = argument[2:].partition("=")
        if name == "config":
            path, _, form = value.partition(":")
            config = importlib.import_module(path[: -len(".py")].replace("/", ".")).get_config(form)
        elif name.startswith("config."):
            configuring.key_type(Experiment, name.removeprefix("config."), config)
        else:
            assert name in names, f"{module} has no --{name}"
    if "--config=" in " ".join(arguments):
        assert "define_config()" in source


SHIM = """#!/bin/sh
# Trains two steps of what would train hundreds, on a synthetic world of few records, and does all
# else as it is asked.
case "$*" in
"-m launch.build_data quickstart "*)
  shift 2
  exec {python} -m tests.small_build_data "$@" ;;
*launch.train*quickstart.py:language_model*)
  exec {python} "$@" --config.training.steps=2 --config.training.required_loss.namings=99 \
    --config.training.required_loss.lookups=99 ;;
*launch.train*) exec {python} "$@" --config.training.steps=2 ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=[pytest.mark.scale] if file in LONG else [])
        for file in FILES
        if RUN[file]
    ],
)
def test_what_a_readme_says_runs_word_for_word(file: str, tmp_path: pathlib.Path) -> None:
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = "".join(block.text for block in RUN[file])
    if "my_" in text:
        make_small_data(tmp_path)
    if "--model=runs/quickstart/flamingo/export" in text:
        make_export(tmp_path / "runs/quickstart/flamingo/export")
    if "=runs/quickstart/data/" in text:
        build_quickstart(tmp_path / "runs/quickstart/data", limit=40)
    shim = tmp_path / "bin" / "python"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {
        "PATH": f"{shim.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
    }
    for block in RUN[file]:
        run(block, tmp_path, environment)


def run(block: Block, folder: pathlib.Path, environment: dict[str, str]) -> None:
    """Runs a block as a reader would who pastes it into a shell that stops at an error."""
    if block.language == "python":
        told = [sys.executable, "-c", block.text]
    else:
        told = ["sh", "-ec", block.text]
    done = subprocess.run(told, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.file}:\n{block.text}\n{done.stdout}\n{done.stderr}"


def test_the_shim_names_flags_that_are_there() -> None:
    config = command.load_config(f"{ROOT}/configs/quickstart.py:language_model")
    for key in re.findall(r"--config\.(\S+)=", SHIM):
        configuring.key_type(Experiment, key, config)
