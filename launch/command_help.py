"""Makes the text of --help: the command's docstring, its flags, and the keys of a config with
a sentence about each.
"""

import re
import sys
import textwrap
from collections.abc import Collection, Sequence

from absl import flags

from flamingo_jax.configuring import described_keys
from flamingo_jax.experiment import Experiment
from launch.command import CONFIG, config_location, load_config

WIDTH = 110
"""Width of a line in characters."""


def help_of(
    argv: Sequence[str], only: Collection[str] | None = None, about: str | None = None
) -> str:
    """Returns the help text of the command that runs.

    Args:
      argv: its command line; with a --config, lists the keys and values of that config.
      only: names of the flags to list; by default all of the command's own.
      about: replaces the command's docstring.
    """
    if about is None:
        about = (sys.modules["__main__"].__doc__ or "").strip()
    lines = [about, "", "Flags:"]
    own = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(argv[0])}
    if CONFIG in flags.FLAGS:
        own = {CONFIG: flags.FLAGS[CONFIG]} | own
    for flag in own.values():
        if only is None or flag.name in only:
            lines += _entry(f"--{flag.name}", _about(flag))
    if CONFIG in own and (only is None or CONFIG in only):
        lines += _config_keys(config_location(argv))
    return "\n".join(lines)


def _config_keys(location: str | None) -> list[str]:
    config = None if location is None else load_config(location).to_dict()
    heading = (
        "Keys of any config, and their defaults:" if config is None else f"Keys of {location}:"
    )
    lines = ["", heading]
    for key, value, about in described_keys(Experiment, config):
        lines += _entry(f"--{CONFIG}.{key}={value}", about)
    return lines


def _entry(name: str, about: str) -> list[str]:
    indent = " " * 6
    wrapped = textwrap.fill(about, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [f"  {name}", *([wrapped] if about else [])]


def _about(flag: flags.Flag) -> str:
    # absl puts an enum's choices before the help text, and a note that a flag may be repeated
    # after it; both are removed here and written in our form below.
    text = re.sub(r"^<[^>]*>: ", "", flag.help).split(";\n", maxsplit=1)[0]
    choices = (
        f" One of {', '.join(flag.parser.enum_values)}."
        if isinstance(flag.parser, flags.EnumParser)
        else ""
    )
    several = " May be given several times." if isinstance(flag, flags.MultiFlag) else ""
    value = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    default = "" if value in (None, "") else f" (default: {value})"
    return f"{text}{choices}{several}{default}"
