"""Turns raw sources into datasets that training reads.

    python -m launch.build_data image_folder --input=photos --output=data/photos

The first word is the source (or use `--source=NAME`); `python -m launch.build_data SOURCE
--help` describes it and lists its flags. The dataset is written to OUTPUT/1.0.0 and can be
opened with `tfds.builder_from_directory`. Its statistics.json counts what became of every
source record, and samples.html shows some of them. A finished dataset is not built again, an
interrupted build continues, and a dataset that another process is building is refused. An
entry that kills its worker (out of memory, a crash in a library) is named and counted, and the
build goes on.
"""

import os
import pathlib
import re
import sys
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import Any

from absl import flags
from rich.console import Console

from data_pipelines.build.sources import OPTIONS, SOURCES, Option, Values, build, refuse_options
from flamingo_jax.configuring import did_you_mean
from flamingo_jax.errors import UserError
from launch import command

_SOURCE = re.compile(r"--?source(?:=(.*))?", re.DOTALL)
_FLAG = re.compile(r"--?(?:no)?([a-z_]+)(?:=.*)?", re.DOTALL)


def prepare(argv: list[str]) -> command.Help:
    """Removes the source from a command line and defines its flags. Returns the help text."""
    name = _take_source(argv)
    if name is None:
        if not {"--help", "-h", "--helpfull"} & set(argv):
            raise UserError(
                f"no source is named: begin with one of {', '.join(SOURCES)}, as in `python -m"
                " launch.build_data image_folder --input=photos --output=data/photos`"
            )
        listed = "\n".join(f"  {name}\n      {entry.about}" for name, entry in SOURCES.items())
        return command.Help(f"{(__doc__ or '').strip()}\n\nSources:\n{listed}", ("output",))
    entry = SOURCES[name]
    others = {match[1] for match in map(_FLAG.fullmatch, argv[1:]) if match}
    refuse_options(name, others & OPTIONS.keys())
    for option in entry.options:
        _define(option, OPTIONS[option])
    usage = f"python -m launch.build_data {name} {entry.example}"
    return command.Help(f"{entry.about}\n\n    {usage}", ("output", *entry.options))


def main() -> int:
    """Builds the dataset of the flags."""
    name, output = SOURCE.value or "", OUTPUT.value
    if not output:
        raise UserError("--output is not set: name the folder of the dataset, or to fill")
    given = {option: flags.FLAGS[option].value for option in command.given_flags() & OPTIONS.keys()}
    if name == "sentencepiece":
        return build_tokenizer(pathlib.Path(output), given)
    made = build(name, pathlib.Path(output), given, workers)
    from data_pipelines.build.statistics_table import statistics_table

    Console(width=None if sys.stdout.isatty() else 160).print(statistics_table(made))
    return 0


def build_tokenizer(output: pathlib.Path, given: dict[str, Any]) -> int:
    """Trains a tokenizer on the text of --input."""
    from data_pipelines.build import sentencepiece_trainer

    refuse_options("sentencepiece", given)
    if not given.get("input"):
        raise UserError("--input is not set: name what sentencepiece shall read")
    values = Values(given)
    with Console(stderr=True).status("reading text") as status:
        trained = sentencepiece_trainer.build_tokenizer(
            values["input"],
            output,
            vocab_size=values["vocab_size"],
            model_type=values["model_type"],
            byte_fallback=values["byte_fallback"],
            user_defined=values["piece"],
            progress=status.update,
        )
    file = output / sentencepiece_trainer.FILE_NAME
    print(f"wrote {file}" if trained else f"{file} is there already and is left as it is")
    return 0


def workers() -> AbstractContextManager[Executor | None]:
    """Returns the pool of processes that read a source, as a context manager."""
    from data_pipelines.build.workers import WorkerPool

    count = flags.FLAGS["workers"].value if "workers" in flags.FLAGS else 0
    return WorkerPool(count or os.cpu_count() or 1)


def _take_source(argv: list[str]) -> str | None:
    """Finds the source of a command line: its first word, which is removed, or --source.

    Returns: None if there is neither. Raises: UserError for an unknown source.
    """
    word = argv.pop(1) if len(argv) > 1 and not argv[1].startswith("-") else None
    name = word
    for place, argument in enumerate(argv):
        if match := _SOURCE.fullmatch(argument):
            after = argv[place + 1] if place + 1 < len(argv) else ""
            name = match[1] if match[1] is not None else after
    if word is not None and name != word:
        raise UserError(f"both {word} and --source={name} are named: leave one out")
    if name is not None and name not in SOURCES:
        meant = did_you_mean(name, SOURCES)
        raise UserError(f"there is no source {name!r}{meant}: choose one of {', '.join(SOURCES)}")
    if word is not None:
        argv.append(f"--source={word}")
    return name


def _define(name: str, option: Option) -> None:
    """Defines the flag of an option."""
    if option.several:
        flags.DEFINE_multi_string(name, list(option.default or ()), option.help)
    elif option.choices:
        flags.DEFINE_enum(name, option.default, option.choices, option.help)
    elif option.kind is bool:
        flags.DEFINE_bool(name, option.default, option.help)
    elif option.kind is int:
        low = None if option.low is None else int(option.low)
        flags.DEFINE_integer(name, option.default, option.help, lower_bound=low)
    elif option.kind is float:
        flags.DEFINE_float(
            name, option.default, option.help, lower_bound=option.low, upper_bound=option.high
        )
    else:
        flags.DEFINE_string(name, option.default, option.help)


SOURCE = flags.DEFINE_string("source", None, "What to build from.")
OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Folder of the dataset, its last part the name; quickstart, sentencepiece: folder to fill.",
)


if __name__ == "__main__":
    command.run(main, prepare=prepare)
