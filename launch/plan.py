"""What a config amounts to, before a machine is rented.

    python -m launch.plan --config=configs/flamingo_80b.py --counts [--json]

`--counts` gives the parameters of every part of the model, from the real modules but without allocating anything.
"""

import json

from absl import flags
from rich.console import Console
from rich.table import Table

from flamingo_jax.errors import UserError
from flamingo_jax.planning.counts import count_parameters
from launch import command

COUNTS = flags.DEFINE_bool("counts", False, "Count the parameters.")
JSON = flags.DEFINE_bool("json", False, "Print JSON rather than a table.")
CONFIG = command.define_config()


def main() -> int:
    experiment = command.experiment(CONFIG)
    if not COUNTS.value:
        raise UserError("nothing to plan: add --counts")
    counts = count_parameters(experiment)
    if JSON.value:
        print(json.dumps({"parameters": counts}))
        return 0
    table = Table("part", title=experiment.name or experiment.task)
    table.add_column("parameters", justify="right")
    table.add_column("", justify="right")
    for part, count in counts.items():
        if part == "trainable":
            table.add_section()
        table.add_row(part.replace("_", " "), f"{count:,}", _short(count))
    Console().print(table)
    return 0


def _short(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return str(count)


if __name__ == "__main__":
    command.run(main)
