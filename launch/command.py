"""Parses flags and `--config` with its overrides for all commands, and turns a user's mistake
into one sentence and an exit code. `command_help` prints --help.

Neither this file nor the top of any command imports jax, so that --help and error messages
appear at once.
"""

import importlib.util
import json
import logging
import math
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from absl import flags
from absl import logging as absl_logging

from flamingo_jax import configuring
from flamingo_jax.bucket_path import STORE_LIBRARIES
from flamingo_jax.distributed.supervised import is_supervised
from flamingo_jax.errors import UserError
from flamingo_jax.experiment import Experiment
from flamingo_jax.partitioning.cpu_devices import configure_cpu_devices
from flamingo_jax.paths import is_bucket
from flamingo_jax.ranges import MAX_SEED
from flamingo_jax.storage import raise_open_files

if TYPE_CHECKING:
    from flamingo_jax.web_page import Table

try:
    import ml_collections
    from ml_collections import config_flags
except ImportError:
    # Of all commands `launch.benchmark device` alone takes no config, and runs without it.
    ml_collections = config_flags = None  # type: ignore[assignment]

# The flags that are defined here are of the command that asks for them, in its --help too.
flags.disclaim_key_flags()

CONFIG = "config"
EXIT_SECONDS = 120.0
"""How long the interpreter may take to exit after `main`: it joins threads, one of which may
hang on storage. Longer than the processes of a run wait for one another
(`distributed.process_group.SHUTDOWN_SECONDS`).
"""
_INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C, as in shells."""
_OVERRIDE = re.compile(rf"^--?(?:no)?{CONFIG}\.([^=]*)")


def define_config() -> flags.FlagHolder:
    """Defines the flag `--config=FILE[:argument]`; `--config.key=value` overrides a field."""
    if config_flags is None:
        return flags.DEFINE_string(CONFIG, None, "Needs ml_collections, which is not installed.")
    return config_flags.DEFINE_config_file(
        CONFIG,
        None,
        "Python file with get_config(), as FILE or FILE:argument; --config.key=value sets one"
        " field.",
    )


def define_parts() -> flags.FlagHolder:
    """Defines the flag `--parts=PART=FOLDER`, which may be repeated."""
    return flags.DEFINE_multi_string(
        "parts",
        [],
        "PART=FOLDER of a frozen part that the model's export names but does not contain"
        " (language_model, vision_encoder), where it is elsewhere now than in training.",
    )


def parts(flag: flags.FlagHolder) -> dict[str, str]:
    """Returns {part: folder} of the flag. Raises UserError for what is not PART=FOLDER."""
    found: dict[str, str] = {}
    for text in flag.value:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"--parts={text} must be PART=FOLDER, as language_model=models/lm")
        found[name] = folder
    return found


def experiment(flag: flags.FlagHolder) -> Experiment:
    """Returns the config of the flag with its overrides, checked against the schema.

    Raises: UserError without --config, and for unknown keys or wrong types.
    """
    if flag.value is None:
        raise UserError(
            "--config is not set: name a config file, such as"
            " --config=configs/quickstart.py:flamingo"
        )
    return configuring.from_config(Experiment, flag.value)


def write_config(value: Experiment, path: pathlib.Path) -> None:
    """Writes the experiment as JSON for `configuring.from_json`, atomically, so that a reader
    never sees a part of it.
    """
    text = json.dumps(configuring.to_json(value), indent=2) + "\n"
    if is_bucket(path):
        path.write_text(text)
        return
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
    ) as file:
        file.write(text)
    os.replace(file.name, path)


class Help(NamedTuple):
    """Text that --help prints instead of a command's docstring, and the flags that it
    lists.
    """

    about: str
    flags: Collection[str]


def run(
    main: Callable[..., int | None],
    verbs: Sequence[str] = (),
    prepare: Callable[[list[str]], Help] | None = None,
) -> NoReturn:
    """Parses the command line, runs `main` and exits with what it returns.

    A UserError, also one about the command line, prints `error: <sentence>` to stderr without
    a traceback, and its exit code (2) is returned.

    Args:
      verbs: if given, the first word of the command line must be one of these, and is passed
        to `main`.
      prepare: gets the command line before it is parsed; it may change it, define flags that
        depend on it, and returns what --help prints.
    """
    _set_up_logging()
    raise_open_files()
    configure_cpu_devices(is_supervised())
    try:
        shown = prepare(sys.argv) if prepare else None
        if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & set(sys.argv[1:]):
            # Imported here, since command_help imports this module.
            from launch.command_help import help_of

            print(help_of(sys.argv, shown.flags, shown.about) if shown else help_of(sys.argv))
            sys.exit(0)
        words = [_pop_verb(sys.argv, verbs)] if verbs else []
        _parse(sys.argv)
        code = main(*words) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        code = _INTERRUPTED
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        _end_by(code)
        raise
    except Exception:
        _end_by(1)
        raise
    _end_by(code)
    sys.exit(code)


def _end_by(code: int) -> None:
    """Kills this process with `code` if the interpreter does not exit within
    `EXIT_SECONDS`.
    """

    def end() -> None:
        time.sleep(EXIT_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    threading.Thread(target=end, daemon=True, name="end").start()


def load_config(location: str) -> "ml_collections.ConfigDict":
    """Loads the config of FILE or FILE:argument.

    Raises: UserError for a missing file, a file that fails, or a get_config that does not
      return a ConfigDict.
    """
    path, _, argument = location.partition(":")
    if ml_collections is None:
        raise UserError(f"--{CONFIG}={location} needs ml_collections: pip install ml_collections")
    if not pathlib.Path(path).is_file():
        raise UserError(f"--{CONFIG}={location}: there is no file {path}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--{CONFIG}={location}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if argument else module.get_config()
    except (UserError, ValueError) as error:
        raise UserError(f"--{CONFIG}={location}: {error}") from None
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"--{CONFIG}={location} fails with {type(error).__name__}: {error}"
            f" ({line.filename}, line {line.lineno})"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--{CONFIG}={location}: get_config returned {type(config).__name__}, not a ConfigDict"
        )
    return config


def reject_unused_flags(
    reads: Mapping[str, Collection[str]], chosen: str, given: Collection[str]
) -> None:
    """Raises a UserError for a flag that would be ignored.

    Args:
      reads: {mode of a command, such as "data --config": flags that only some modes read}.
      chosen: the mode of this call.
      given: the flags on the command line (see `given_flags`).
    """
    for name in sorted(given):
        readers = [way for way, names in reads.items() if name in names]
        if readers and chosen not in readers:
            raise UserError(
                f"--{name} is not read by {chosen} but by {', '.join(readers)}: "
                "leave it out, or choose one of these"
            )


def print_table(table: "Table") -> None:
    """Prints a table, 120 columns wide where the output is no terminal."""
    import rich.table
    from rich.console import Console

    from flamingo_jax.web_page import cell

    shown = rich.table.Table(*table.header)
    for row in table.rows:
        shown.add_row(*map(cell, row))
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def given_flags() -> set[str]:
    """Returns the names of the flags on the command line."""
    return {name for name in flags.FLAGS if flags.FLAGS[name].present}


def _set_up_logging() -> None:
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.INFO)
    absl_logging.set_stderrthreshold("info")
    absl_logging.get_absl_handler().setFormatter(
        logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    )
    # At level INFO these log every save and every compilation.
    for noisy in (
        "jax",
        "orbax",
        "absl",
        "tensorstore",
        "grain",
        "tensorflow_datasets",
        *STORE_LIBRARIES,
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _pop_verb(argv: list[str], verbs: Sequence[str]) -> str:
    if len(argv) < 2 or argv[1] not in verbs:
        raise UserError(f"the first word must say what to do: {' or '.join(verbs)}; see --help")
    return argv.pop(1)


def _parse(argv: Sequence[str]) -> None:
    """Parses the command line into absl's FLAGS. Raises UserError for anything wrong with
    it.
    """
    overrides = [match[1] for match in map(_OVERRIDE.match, argv) if match]
    config = _checked_config(argv, overrides)
    try:
        rest = flags.FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        known = [name for name in flags.FLAGS if "." not in name]
        raise UserError(
            "there is no flag"
            f" --{error.flagname}{configuring.did_you_mean(error.flagname, known, '--')};"
            " --help lists them"
        ) from None
    except flags.IllegalFlagValueError as error:
        wrong = re.match(rf"flag --{CONFIG}\.([^=]+)=(.*?): ", str(error), re.DOTALL)
        if wrong is None or config is None:
            raise UserError(" ".join(str(error).split())) from None
        raise _wrong_type(wrong[1], wrong[2], config) from None
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from None
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag: write --name=value; --help lists the flags")
    _check_numbers()


def _check_numbers() -> None:
    """Raises UserError for a NaN or infinite flag, which absl's bounds accept, or a huge
    int.
    """
    for name in flags.FLAGS:
        if "." in name:  # The config's own, which its schema checks.
            continue
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name}={value} is no finite number: give one")
        if type(value) is int and abs(value) > MAX_SEED:
            raise UserError(f"--{name}={value} is out of bounds: numbers go to {MAX_SEED}")


def _checked_config(
    argv: Sequence[str], overrides: Sequence[str]
) -> "ml_collections.ConfigDict | None":
    """Loads the --config of a command line without its overrides, and checks their keys, for
    which config_flags would print a traceback.
    """
    location = config_location(argv)
    if location is None or CONFIG not in flags.FLAGS:
        if overrides:
            why = (
                "comes without --config=FILE"
                if CONFIG in flags.FLAGS
                else "was given, but this command takes no config"
            )
            raise UserError(f"--{CONFIG}.{overrides[0]} {why}; see --help")
        return None
    config = load_config(location)
    for key in overrides:
        kind = configuring.key_type(Experiment, key, config)
        if isinstance(config_value(config, key), ml_collections.ConfigDict):
            raise UserError(
                f"{CONFIG}.{key} is {configuring.describe(kind)}: set its keys one by one, as"
                f" --{CONFIG}.{key}.name=value"
            )
    return config


def config_value(config: "ml_collections.ConfigDict", key: str) -> Any:
    """Returns the value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def config_location(argv: Sequence[str]) -> str | None:
    """Returns the value of --config on a command line, None if it is not given."""
    found = None
    for place, argument in enumerate(argv):
        if argument in (f"--{CONFIG}", f"-{CONFIG}") and place + 1 < len(argv):
            found = argv[place + 1]
        elif match := re.match(rf"^--?{CONFIG}=(.*)$", argument, re.DOTALL):
            found = match[1]
    return found


def _wrong_type(key: str, text: str, config: Mapping[str, Any]) -> UserError:
    return UserError(
        f"{CONFIG}.{key} is {text!r}, but must be"
        f" {configuring.describe(configuring.key_type(Experiment, key, config))}"
    )
